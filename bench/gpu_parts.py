"""What bench/gpu.py measures, part by part, the most valuable numbers first. bench/gpu.py runs this file.

    python bench/gpu_parts.py --out FILE --deadline SECONDS --parts NAME ... [--model 1b] [--pairs 64]

Each result is a line of FILE, on disk before the next measurement begins, so that losing the machine loses nothing. A
part that fails leaves a line with the reason; after an error that breaks the GPU's context the process exits with 3,
and bench/gpu.py starts another one for the remaining parts.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import contrastive_loss
import gpu_children
import measure
import padded
import records
import scoring
from contestants import take_gradients
from gcrm_fast.data.encoding import TokenizedPair
from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.model.attention import packed_attention, resolve_backend
from gcrm_fast.model.inputs import Pack
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.training import accounting, memory, parallel, prepare
from gcrm_fast.training.config import TrainConfig
from gcrm_fast.training.memory import MemoryShape
from gcrm_kernels import goal_contrastive_loss, q_values
from gcrm_kernels.launch import LaunchConfig
from our_step import MODELS, RECOMPUTING, Groups, Ours, packed_work, sampling_of
from step_costs import profiled

SHAPES = ((100, 225), (250, 80))  # tokens of a prompt and of each completion: GSM8K's, and HH's
PACK, LARGE_PACK = 16_384, 36_864  # tokens
KINDS = {  # kinds of kernels in a profile, by a part of their name; the first match counts
    "matrix products": ("gemm", "nvjet", "cutlass", "sm90_x", "cublas"),
    "attention": ("flash",),
    "our kernels": ("_rms_norm", "_swiglu", "_add_rows", "_contrastive", "_rotary"),
    "AdamW": ("multi_tensor", "fused_adam"),
    "copies and casts": ("copy", "chunk_cat", "memcpy"),
    "concatenation and indexing": ("cat", "index", "gather", "embedding"),
}


class Part(NamedTuple):
    """``seconds``: its duration on an H100; it is skipped if less time is left."""

    name: str
    seconds: int
    run: Callable[["Lab"], None]


@dataclass
class Lab:
    """What the parts share: where results go, the process group, and the model, which is built once."""

    out: Path
    started: float
    mesh: DeviceMesh
    device: torch.device
    config: ModelConfig
    pairs: int
    part: str = ""
    ours: Ours | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def put(self, what: str, **row: Any) -> None:
        """Writes one result: a line in the file and on stdout."""
        line = {"t": round(time.monotonic() - self.started, 1), "part": self.part, "what": what, **row}
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in line.items()}
        shown.pop("trace", None)
        print("  ".join(f"{key} {value}" for key, value in shown.items())[:400], flush=True)

    def timed(self, function: Callable[[], object], count: int = 5, warm: int = 2) -> tuple[float, float]:
        """(seconds per call, seconds of host time in it)."""
        count, warm = (count, warm) if self.cuda else (1, 0)  # elsewhere only a dry run
        for _ in range(warm):
            function()
        start, host = measure.now(self.device), 0.0
        for _ in range(count):
            called = time.perf_counter()
            function()
            host += time.perf_counter() - called
        return (measure.now(self.device) - start) / count, host / count

    def model(self) -> Ours:
        if self.ours is None:
            start = measure.now(self.device)
            options = TrainConfig(lr=1e-5, tokens_per_batch=PACK)
            self.ours = Ours(self.config, options, torch.bfloat16, self.mesh, self.device)
            held = torch.cuda.memory_allocated() / 1e9 if self.cuda else 0.0
            self.put("model built", seconds=measure.now(self.device) - start, GB=held)
        return self.ours

    def release(self) -> None:
        """Frees the model's memory."""
        self.ours = None
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def batch(self, prompt: int, completion: int) -> Groups:
        return [[pair] for pair in equal_pairs(prompt, completion, self.pairs)]

    def packs(self, batch: Groups, tokens: int = PACK, without: str = "") -> list[Pack]:
        ours = self.model()
        ours.budget = replace(ours.budget, tokens=tokens)
        return [pack.pin_memory() if self.cuda else pack for pack in ours.packs(batch, without)]

    def step(
        self, what: str, packs: list[Pack], without: str = "", count: int = 5, given: Mapping[str, Any] | None = None
    ) -> None:
        """Times optimizer steps on ``packs``, recomputing what the trainer would; reports the memory that
        memory.py predicts too."""
        ours, shape = self.model(), memory_shape(self.config, packs)
        n_pairs = sum(pack.n_pairs for pack in packs)
        recompute = RECOMPUTING.get(without, "none")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            if without not in RECOMPUTING:
                total = torch.cuda.get_device_properties(self.device).total_memory
                recompute = memory.choose_plan(total, shape, gather=ours.model.gather)[0]
                without = without or ("" if recompute == "none" else f"recomputing {recompute}")
        about = {
            **(given or {}),
            "predicted GB": memory.predicted_memory(shape, recompute, ours.model.gather) / 1e9,
        }
        try:
            seconds, host = self.timed(lambda: ours.step(packs, n_pairs, without), count)
        except torch.OutOfMemoryError:
            self.put(what, note="out of memory", recompute=recompute, **about)
            ours.model.zero_grad()
            torch.cuda.empty_cache()
            return
        work = packed_work(self.config, packs)
        peak = accounting.peak_flops(self.device, torch.bfloat16)[0] if self.cuda else 1e12
        self.put(
            what,
            **{"pairs/s": n_pairs / seconds, "ms": 1e3 * seconds, "host ms": 1e3 * host, "packs": len(packs)},
            **{"MFU %": 100 * work.flops / seconds / peak, "tokens": work.tokens, "recompute": recompute},
            **{"peak GB": torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0},
            **about,
        )


def equal_pairs(prompt: int, completion: int, count: int, per_prompt: int = 1) -> list[TokenizedPair]:
    return [records.random_pair(i, i // per_prompt, prompt, completion, completion) for i in range(count)]


def memory_shape(config: ModelConfig, packs: Sequence[Pack]) -> MemoryShape:
    """The shape of a step on ``packs`` in bfloat16 on one process."""
    largest = max(packs, key=lambda pack: len(pack.input_ids_T))
    tokens, keys, rows = (len(x) for x in (largest.input_ids_T, largest.kv_index_K, largest.read_rows_R))
    return MemoryShape(
        config=config,
        tokens=tokens,
        keys=keys,
        read_rows=rows,
        optimizer="adamw",
        width=2,
        kernels=True,
        world_size=1,
        several_packs=len(packs) > 1,
    )


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|"""
    difference = found.detach().float() - expected.detach().float()
    return float(difference.norm() / expected.detach().float().norm().clamp_min(1e-30))


# ------------------------------------------------------------------------------------------------- correct before fast


def rates(lab: Lab) -> None:
    """The peak rates of this card, and its rates on the step's own shapes."""
    n = 8192 if lab.cuda else 512
    a, b = torch.randn(2, n, n, device=lab.device).bfloat16()
    lab.put("matrix product", n=n, tflops=2 * n**3 / lab.timed(lambda: a @ b, 10)[0] / 1e12)
    x = torch.randn(2**30 if lab.cuda else 2**20, device=lab.device).bfloat16()
    y = torch.empty_like(x)
    lab.put("copy", tbps=2 * x.nbytes / lab.timed(lambda: y.copy_(x), 10)[0] / 1e12)
    c = lab.config
    h, f = c.hidden_size, c.intermediate_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    for tokens in (PACK, LARGE_PACK) if lab.cuda else (64,):
        for name, n, k in (("q", q, h), ("kv", kv, h), ("up", f, h), ("gate and up", 2 * f, h), ("down", h, f)):
            lab.put(f"matrix product {name}", tokens=tokens, **product_rates(lab, tokens, n, k))


def product_rates(lab: Lab, tokens: int, n: int, k: int) -> dict[str, float]:
    """TFLOP/s of a linear layer's three products."""
    x_TK, w_NK, g_TN = (torch.randn(s, device=lab.device).bfloat16() for s in ((tokens, k), (n, k), (tokens, n)))
    ways = {"forward": lambda: x_TK @ w_NK.T, "dx": lambda: g_TN @ w_NK, "dw": lambda: g_TN.T @ x_TK}
    return {way: 2 * tokens * n * k / lab.timed(call, 6)[0] / 1e12 for way, call in ways.items()}


def attention(lab: Lab) -> None:
    """Attention in bfloat16 against eager float32: shared prefixes, fewer key/value heads, more keys than queries."""
    backend = resolve_backend("auto", lab.device, torch.bfloat16)
    groups = [equal_pairs(100, 225, 3, 3), equal_pairs(7, 1, 1), equal_pairs(300, 40, 2)]
    pack = build_pack(groups, Sampling(), 0).to(lab.device)
    for heads, kv_heads, size in ((32, 8, 64), (32, 8, 128), (4, 4, 64)):
        shapes = [(len(pack.input_ids_T), count, size) for count in (heads, kv_heads, kv_heads, heads)]
        *qkv, grad = (torch.randn(shape, device=lab.device).bfloat16() for shape in shapes)
        results = []
        for dtype, way in ((torch.float32, "eager"), (torch.bfloat16, backend)):
            q, k, v = (x.to(dtype).requires_grad_() for x in qkv)
            index = pack.kv_index_K
            out = packed_attention(
                q, k[index], v[index], pack.cu_seqlens_q, pack.cu_seqlens_k, pack.max_seqlen_q, pack.max_seqlen_k, way
            )
            results.append((out, *torch.autograd.grad(out, (q, k, v), grad.to(dtype))))
        exact, found = results
        errors = {name: relative(f, e) for name, f, e in zip(("out", "dq", "dk", "dv"), found, exact, strict=True)}
        about = {"backend": backend, "heads": heads, "kv heads": kv_heads, "head size": size}
        lab.put("attention", **about, **errors, right=max(errors.values()) < 2e-2)


def kernels_agree(lab: Lab) -> None:
    """A small model with our kernels and in plain PyTorch: loss and every gradient against plain float32."""
    config = replace(
        MODELS["tiny"], hidden_size=512, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=8, head_dim=64
    )
    batch: Groups = [[pair] for pair in records.sampled("gsm8k_pairs", 8, 0)]
    exact: tuple[float, dict[str, Tensor]] | None = None
    for dtype in (torch.float32, torch.bfloat16):
        ours = Ours(config, TrainConfig(lr=1e-5), dtype, lab.mesh, lab.device)
        plain = 0.0
        for without in ("Triton", "", "fused RoPE", "recomputing product", "recomputing block"):
            sums = ours.accumulate(ours.packs(batch), len(batch), without)
            loss = float(sums["loss"])
            gradients = take_gradients(ours.model)
            exact = exact or (loss, gradients)
            error = max(relative(gradients[name], exact[1][name]) for name in gradients)
            plain = plain or max(error, 1e-4)
            about = {"dtype": str(dtype), "loss": abs(loss / exact[0] - 1), "worst gradient": error}
            form = without if without in RECOMPUTING else f"without {without}" if without else "all"
            lab.put(f"kernels, {form}", **about, right=error < 1.5 * plain)


# ------------------------------------------------------------------------------------------------------ the step


def step(lab: Lab) -> None:
    for prompt, completion in SHAPES:
        for tokens in (PACK, LARGE_PACK):
            packs = lab.packs(lab.batch(prompt, completion), tokens)
            lab.step("step", packs, given={"shape": f"{prompt}/{completion}", "tokens per pack": tokens})


def no_waiting(lab: Lab) -> None:
    """Where the host waits for the GPU in a step; expected: nowhere."""
    ours, packs = lab.model(), lab.packs(lab.batch(*SHAPES[0]))
    ours.step(packs, lab.pairs)
    measure.now(lab.device)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if lab.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        ours.step(packs, lab.pairs)
        if lab.cuda:
            torch.cuda.set_sync_debug_mode("default")
    where = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in seen})
    lab.put("waits of the host", count=len(seen), where=", ".join(where[:8]))


def profile(lab: Lab) -> None:
    ours = lab.model()
    ours.budget = replace(ours.budget, tokens=PACK)
    rows = profiled(ours, lab.batch(*SHAPES[0]))
    shares: dict[str, float] = {}
    for row in rows:
        name = row["kernel"].lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other elementwise")
        shares[kind] = shares.get(kind, 0.0) + row["%"]
    lab.put("profile", ms=sum(row["ms"] for row in rows), **dict(sorted(shares.items(), key=lambda item: -item[1])))
    for row in rows[:40]:
        lab.put("kernel", **row)


def variants(lab: Lab) -> None:
    """Each lever removed, each way to save memory, and weights gathered for every pack."""
    packs = lab.packs(lab.batch(*SHAPES[0]))
    ours = lab.model()
    lab.step("variant: as it is", packs)
    for lever in ("packing", "sharing", "read rows", "fused loss"):
        count = 1 if lever == "packing" else 3  # a pack per pair takes seconds per step
        lab.step(f"variant: without {lever}", lab.packs(lab.batch(*SHAPES[0]), without=lever), lever, count)
    for without in ("fused RoPE", "Triton", "recomputing product", "recomputing mlp", "recomputing block"):
        lab.step(f"variant: {without if without in RECOMPUTING else f'without {without}'}", packs, without, 4)
    parallel.set_gather(ours.model, "block")
    lab.step("variant: weights gathered for every pack", packs)
    parallel.set_gather(ours.model, "step")
    for name in records.DATA:
        lab.step(f"lengths of {name}", lab.packs([[pair] for pair in records.sampled(name, lab.pairs, 0)]))
    long = [[pair] for pair in equal_pairs(200, 4000 if lab.cuda else 40, 4)]
    lab.step("8,200 tokens per pair", lab.packs(long), count=3)
    one = packs[:1]
    seconds = lab.timed(lambda: ours.accumulate(one, one[0].n_pairs))[0]
    ours.model.zero_grad()
    lab.put("one pack, forward and backward", ms=1e3 * seconds)


def baseline(lab: Lab) -> None:
    """transformers on padded batches, and TRL's RewardTrainer, on the same pairs."""
    lab.release()
    options = TrainConfig(lr=1e-5)
    objective, sampling = prepare.objective_of(options), sampling_of(options)
    model = padded.Padded(lab.config, options, objective, sampling, torch.bfloat16, lab.device)
    batch = equal_pairs(*SHAPES[0], lab.pairs)
    for size, checkpointing in ((8, False), (16, False), (8, True)):
        model.checkpointing(checkpointing)
        about = {"pairs per batch": size, "checkpointing": checkpointing, "attention": model.attention}
        try:
            seconds = lab.timed(functools.partial(model.step, batch, size, True), 2, 1)[0]
            lab.put("padded", **about, **{"pairs/s": lab.pairs / seconds, "ms": 1e3 * seconds})
        except torch.OutOfMemoryError:
            lab.put("padded", **about, note="out of memory")
            torch.cuda.empty_cache()
    if missing := padded.trl_missing():
        lab.put("TRL", note=missing)
        return
    for shipped in (False, True):
        seconds = min(padded.trl_steps(model, [batch] * 3, 8, shipped).seconds)
        lab.put("TRL", **{"as shipped": shipped, "pairs/s": lab.pairs / seconds, "ms": 1e3 * seconds})


def wide(lab: Lab) -> None:
    """The 8b shape with 8 of its 32 layers: all of float32 AdamW fits, and MFU is nearly that of the whole."""
    lab.release()
    kept = lab.config
    lab.config = replace(MODELS["8b"], num_hidden_layers=8) if lab.cuda else kept
    try:
        lab.step("8b shape, 8 layers", lab.packs(lab.batch(*SHAPES[0])), count=3)
    finally:
        lab.config = kept
        lab.release()


def compiled(lab: Lab) -> None:
    """torch.compile per block, with our kernels and with plain PyTorch that it can fuse."""
    lab.release()
    start = measure.now(lab.device)
    options = TrainConfig(lr=1e-5, compile=True, tokens_per_batch=PACK)
    lab.ours = Ours(lab.config, options, torch.bfloat16, lab.mesh, lab.device)
    packs = lab.packs(lab.batch(*SHAPES[0]))
    lab.ours.step(packs, lab.pairs)
    lab.put("compiling", seconds=measure.now(lab.device) - start)
    lab.step("compiled, our kernels", packs, count=4)
    lab.step("compiled, plain PyTorch", packs, "Triton", 4)
    lab.release()


# ------------------------------------------------------------------------------------------------- single operators


def contrastive(lab: Lab) -> None:
    """The contrastive loss against naive forms, from few to many pairs; the dense loss; Q-values."""
    lab.release()
    bandwidth = measure.copy_bandwidth(lab.device)
    seconds = 0.1 if lab.cuda else 0.01
    wanted = ("forward ms", "forward+backward ms", "graph ms", "x naive", "extra MB", "GB/s", "% of copy", "note")
    for n in (8, 64, 512) if lab.cuda else (2,):
        for case in contrastive_loss.cases(n, 16, 4096 if lab.cuda else 64, 0, lab.device, torch.bfloat16):
            for row in contrastive_loss.compare(case, bandwidth, seconds):
                found = {name: row[name] for name in wanted if row.get(name) is not None}
                lab.put(f"contrastive: {row['method']}", N=n, states=row["input"], **found)
    shape = (32, 200, 4096) if lab.cuda else (2, 8, 64)
    for row in contrastive_loss.compare_dense(*shape, lab.device, torch.bfloat16, seconds):
        lab.put(f"dense: {row['method']}", N=shape[0], ms=row["forward+backward ms"], **{"x naive": row["x naive"]})
    states = torch.randn(PACK, shape[2], device=lab.device).bfloat16()
    goals = torch.randn(4, shape[2], device=lab.device)
    spent = lab.timed(lambda: q_values(states, goals), 20)[0]
    lab.put("Q-values", ms=1e3 * spent, tbps=states.nbytes / spent / 1e12)


def tuning(lab: Lab) -> None:
    """The launch configurations that GCRM_AUTOTUNE=1 chooses from, and a few more."""
    if not lab.cuda:
        lab.put("tuning", note="needs a GPU")
        return
    from gcrm_kernels import triton_contrastive, triton_qvalues

    wide = [LaunchConfig(*shape) for shape in ((64, 4, 2), (128, 4, 2), (128, 8, 2), (256, 8, 2), (256, 8, 1))]
    [_, case] = contrastive_loss.cases(512, 16, 4096, 0, lab.device, torch.bfloat16)
    grad = torch.ones(512, device=lab.device)
    has_positive = torch.ones(512, dtype=torch.bool, device=lab.device)

    def loss(pairing: str, hidden: Tensor) -> Tensor:
        return goal_contrastive_loss(
            hidden, *case.rows, has_positive_N=has_positive, pairing=pairing, tiles=case.tiles
        )[0]

    def both(pairing: str) -> None:
        hidden = case.hidden.detach().requires_grad_()
        torch.autograd.grad(loss(pairing, hidden), hidden, grad)

    states = torch.randn(PACK, 4096, device=lab.device).bfloat16()
    goals = torch.randn(4, 4096, device=lab.device)
    trials: list[tuple[str, Any, str, Callable[[], object], list[LaunchConfig]]] = [
        ("Q-values", triton_qvalues, "candidates", lambda: q_values(states, goals), triton_qvalues.candidates(2))
    ]
    for pairing in ("paired", "grid"):
        no_grad = torch.no_grad()(lambda pairing=pairing: loss(pairing, case.hidden))
        forward = [LaunchConfig(256, warps, 2) for warps in (2, 4, 8)] + [LaunchConfig(512, 4, 2)]
        trials.append((f"forward, {pairing}", triton_contrastive, "forward_candidates", no_grad, forward))
        backward = [*triton_contrastive.backward_candidates(16, 2), *wide]
        call = functools.partial(both, pairing)
        trials.append((f"forward + backward, {pairing}", triton_contrastive, "backward_candidates", call, backward))
    for name, module, attribute, function, configs in trials:
        for config in dict.fromkeys(configs):
            with mock.patch.object(module, attribute, return_value=[config]):
                milliseconds = measure.graph_time(function)
            lab.put(f"tuning: {name}", **dataclasses.asdict(config), ms=milliseconds)


def scored(lab: Lab) -> None:
    """Completions per second against padded batches: 8 per prompt, lengths of GSM8K answers."""
    lab.release()
    encoded = records.completions("gsm8k_pairs", 50 if lab.cuda else 2, 8)
    theirs = scoring.padded_model(lab.config, torch.bfloat16, lab.device)
    ours = scoring.our_model(lab.config, torch.bfloat16, lab.device, PACK)
    lab.put("rewards alike", right=scoring.same_rewards(theirs, ours, encoded[:24], torch.bfloat16))
    for row in scoring.race(theirs, ours, encoded, lab.device, 0.0):
        lab.put(f"scoring: {row['method']}", **{k: row[k] for k in ("batch", "completions/s", "x padded") if k in row})


# ------------------------------------------------------------------------------------------------ tests and training


def tests(lab: Lab) -> None:
    """The tests that depend on the device."""
    lab.release()
    for what, row in gpu_children.tests():
        lab.put(what, **row)


def training(lab: Lab) -> None:
    """A run with checkpoints, and one that is stopped and resumed."""
    lab.release()
    for what, row in gpu_children.training():
        lab.put(what, **row)


PARTS = [
    Part("rates", 15, rates),
    Part("attention", 10, attention),
    Part("kernels_agree", 35, kernels_agree),
    Part("step", 30, step),
    Part("no_waiting", 5, no_waiting),
    Part("profile", 15, profile),
    Part("variants", 110, variants),
    Part("baseline", 60, baseline),
    Part("wide", 30, wide),
    Part("contrastive", 100, contrastive),
    Part("tuning", 25, tuning),
    Part("compiled", 60, compiled),
    Part("scored", 60, scored),
    Part("tests", gpu_children.TESTS_SECONDS, tests),
    Part("training", 100, training),
]


@contextlib.contextmanager
def laboratory(options: argparse.Namespace) -> Iterator[Lab]:
    with parallel.process_group() as (mesh, device):
        config = MODELS[options.model]
        if device.type != "cuda":  # a dry run: as small as possible
            config = replace(
                config,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
            )
        yield Lab(options.out, time.monotonic(), mesh, device, config, options.pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file to append the results to")
    parser.add_argument("--deadline", type=float, default=350, help="seconds from now; default: 350")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], default=[p.name for p in PARTS])
    parser.add_argument("--model", choices=MODELS, default="1b")
    parser.add_argument("--pairs", type=int, default=64, help="pairs per step; default: 64")
    options = parser.parse_args()
    end = time.monotonic() + options.deadline
    with laboratory(options) as lab:
        where = measure.environment(lab.device)
        lab.put("begin", **where, config=dataclasses.asdict(lab.config), pairs=lab.pairs, parts=options.parts)
        for part in sorted((p for p in PARTS if p.name in options.parts), key=lambda p: options.parts.index(p.name)):
            lab.part = part.name
            left = end - time.monotonic()
            if lab.cuda and left < part.seconds:
                lab.put("skipped", left=left, needs=part.seconds)
                continue
            lab.put("began", needs=part.seconds)
            begun = time.monotonic()
            try:
                part.run(lab)
                lab.put("done", seconds=time.monotonic() - begun)
            except (Exception, SystemExit) as error:
                lab.put("failed", why=repr(error)[:300], trace=traceback.format_exc()[-4000:])
                print(traceback.format_exc()[-2000:], flush=True)
                try:
                    lab.release()
                    measure.now(lab.device)
                except RuntimeError:  # the GPU's context is lost
                    os._exit(3)
    return 0


if __name__ == "__main__":
    sys.exit(main())
