"""The whole training step, side by side in one process: how fast is it, against what people run, and why?

    python bench/train_step.py [--model tiny|1b|8b] [--dtype float32|bfloat16] [--quick] [--scaling] [--profile]

    naive    transformers' LlamaForSequenceClassification on padded batches, two sequences a pair, ranking loss and a
             naive contrastive loss; 8 pairs a micro-batch with gradient checkpointing off and on, and sorted by length
             within the global batch at its best micro-batch
    TRL      the real RewardTrainer (ranking loss only), 8 pairs a micro-batch, as shipped and without checkpointing
    ours     what gcrm_fast.train runs: packs, shared prefixes, read rows, fused contrastive loss, on a GPU Triton
             kernels; then with each of them removed, one at a time, with --recompute mlp and block, and with more
             pairs of one prompt in a step

The same records, weights, global batches, AdamW and dtype for all; TRL and naive share one model, ours is another.
bfloat16 is compute in bfloat16 over float32 weights (autocast there, FSDP's mixed precision here). Before any timing,
loss and gradients of naive and of every form of ours are compared, in float32 and in the dtype that is timed; if they
differ, nothing is. Contestants take
turns, so that what else the machine does falls on all. pairs/s: all pairs over the sum of each step's median time;
p10 and p90 are of single steps. "sequence tokens/s" counts both sequences of a pair without padding, the same for all;
"computed/pair" is what went through the layers, padding included. FLOPs are the model's for those tokens, with half
of causal attention; recomputation is not counted. "% matmul" is of the rate of a large matrix product measured in the
same run. Peak memory is that of a step beyond weights and optimizer: gradients, activations, temporaries. All
contestants run with freed memory kept by glibc, as the trainer sets it, which helps the padded ones too.
"""

import argparse
import contextlib
import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn
from unittest import mock

import matplotlib
import measure
import numpy as np
import padded
import records
import torch
from gcrm_kernels import ContrastiveStatistics, InverseIndex, RowTiles, reference
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from gcrm_fast import accounting, checkpoint, model, objectives, packing, parallel, prepare, train
from gcrm_fast.config import TrainConfig
from gcrm_fast.data import TokenizedPair
from gcrm_fast.model import LlamaRewardModel, ModelConfig
from gcrm_fast.optimizer import Updater, cast_weights
from gcrm_fast.packing import Budget, Pack, Sampling, build_pack, epoch_batches, plan_packs

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MODELS = {
    "tiny": ModelConfig(vocab_size=32_000, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
                        num_attention_heads=8, num_key_value_heads=4, head_dim=32),
    "1b": ModelConfig(vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                      num_attention_heads=32, num_key_value_heads=8, head_dim=64, rope_theta=500_000.0),
    "8b": ModelConfig(vocab_size=128_256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                      num_attention_heads=32, num_key_value_heads=8, head_dim=128, rope_theta=500_000.0),
}  # fmt: skip
LEVERS = ("packing", "sharing", "read rows", "fused loss") + (("Triton",) if torch.cuda.is_available() else ())
RECOMPUTING = {"recomputing mlp": "mlp", "recomputing block": "block"}  # forms that spare memory: --recompute
PAIRS = 8  # a micro-batch, as people run it
SIZES = (4, 8, 16, 32)  # micro-batches of which the padded reference may choose its best
CHECKED_PAIRS = 4
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of the loss, and of each parameter's gradient, by its norm
COLUMNS = ("data", "method", "pairs/s", "p10", "p90", "x naive", "x TRL", "x TRL shipped", "sequence tokens/s",
           "computed/pair", "GFLOP/s", "% matmul", "MFU %", "peak MB")  # fmt: skip
SCALING_COLUMNS = ("what", "n", "tokens", "ms", "us/token", "pairs/s", "GFLOP/s", "peak MB")
NAIVE, TRL, TRL_SHIPPED, OURS = f"naive, {PAIRS} pairs", "TRL, no checkpointing", "TRL, as shipped", "ours"

Groups = list[list[TokenizedPair]]  # one global batch: pairs of one prompt that are computed together


# ---------------------------------------------------------------------------------------------- what a step computes


@dataclass(frozen=True)
class Work:
    """Tokens through the layers, and model FLOPs forward + backward."""

    tokens: int
    flops: float


def packed_work(config: ModelConfig, packs: Sequence[Pack]) -> Work:
    done = [accounting.work(pack, config, "none") for pack in packs]
    return Work(int(sum(w.tokens for w in done)), sum(w.model_flops for w in done))


def padded_work(config: ModelConfig, micro_batches: Sequence[Sequence[TokenizedPair]]) -> Work:
    tokens, flops = 0, 0.0
    for pairs in micro_batches:
        sequences, length = 2 * len(pairs), max(map(padded.longest, pairs))
        tokens += sequences * length
        flops += 3 * accounting.forward_flops(
            config, sequences * length, sequences * length * (length + 1) // 2, sequences * length
        )
    return Work(tokens, flops)


# -------------------------------------------------------------------------------------------------------------- ours


def flat(groups: Groups) -> list[TokenizedPair]:
    return [pair for group in groups for pair in group]


def naive_loss(z_RD: Tensor, pairs: packing.PairRows, objective: objectives.Objective) -> tuple:
    """In the place of objectives.contrastive_loss: the naive loss on the same states, similarities not measured."""
    unmeasured = z_RD.new_zeros(len(pairs.has_positive_N))
    loss_N = padded.naive_contrastive(z_RD, pairs.samples_4NS, pairs.has_positive_N)
    return loss_N, ContrastiveStatistics(unmeasured, unmeasured)


def never(x: Tensor) -> bool:
    return False


def plain_rms_norm(
    x_TH: Tensor, weight_H: Tensor, eps: float, residual_TH: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    s_TH = x_TH if residual_TH is None else x_TH + residual_TH
    y_TH = torch.nn.functional.rms_norm(s_TH, weight_H.shape, weight_H, eps)
    return y_TH if residual_TH is None else (y_TH, s_TH)


def reading_all_rows(pack: Pack) -> Pack:
    """The pack with every token a read row: a full last layer and final norm, losses on the same states."""
    rows, tokens = pack.read_rows_R, len(pack.input_ids_T)
    every = np.arange(tokens)
    samples_4NS = rows[pack.pairs.samples_4NS]
    pairs = replace(pack.pairs, end_2N=rows[pack.pairs.end_2N], samples_4NS=samples_4NS,
                    samples_tiles=RowTiles.of(samples_4NS.numpy(), tokens))  # fmt: skip
    return replace(pack, read_rows_R=torch.from_numpy(every), read_inverse=InverseIndex.of(every, tokens), pairs=pairs)


class Ours:
    """The model as the trainer builds it, on a process group of one, and its optimizer step."""

    def __init__(self, config: ModelConfig, options: TrainConfig, dtype: torch.dtype, mesh: DeviceMesh,
                 device: torch.device) -> None:  # fmt: skip
        with torch.device("meta"):
            self.model = LlamaRewardModel(config, options.attention)
        cast_weights(self.model, options.optimizer)
        if options.compile:
            self.model.compile_blocks()
        parallel.shard(self.model, mesh, dtype)
        parallel.materialize(self.model, mesh, device, checkpoint.fresh_weights(config, options.seed).rows)
        self.updater = Updater(self.model, options, padded.SCHEDULE_STEPS, device)
        self.objective, self.sampling = prepare.objective_of(options), sampling_of(options)
        self.budget = Budget(options.tokens_per_batch, config.hidden_size)
        self.device = device

    def packs(self, batch: Groups, without: str = "") -> list[Pack]:
        """The trainer's packs of a global batch, or those without a lever of LEVERS that decides over them."""
        with mock.patch.object(packing, "common_prefix", return_value=0) if without == "sharing" else no_change():
            plan = [[group] for group in batch] if without == "packing" else plan_packs(batch, self.budget, 1)
            packs = [build_pack(groups, self.sampling, 0) for groups in plan]
        return [reading_all_rows(pack) for pack in packs] if without == "read rows" else packs

    def accumulate(self, packs: list[Pack], n_pairs: int, without: str = "") -> Tensor:
        for layer in self.model.model.layers:
            layer.recompute = RECOMPUTING.get(without, "none")
        with contextlib.ExitStack() as removed:
            if without == "fused loss":
                removed.enter_context(mock.patch.object(objectives, "contrastive_loss", naive_loss))
            if without == "Triton":
                for name in ("contrastive", "gather"):
                    module = importlib.import_module(f"gcrm_kernels.{name}")
                    removed.enter_context(mock.patch.object(module, "use_triton", new=never))
                # Plain PyTorch, which torch.compile can fuse, unlike an operator of ours.
                removed.enter_context(mock.patch.object(model, "rms_norm", new=plain_rms_norm))
                removed.enter_context(mock.patch.object(model, "swiglu", new=reference.swiglu))
            return train.accumulate(self.model, packs, n_pairs, self.objective, self.device)

    def step(self, packs: list[Pack], n_pairs: int, without: str = "") -> None:
        self.updater.update(0, self.accumulate(packs, n_pairs, without)[0])


def no_change() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def sampling_of(options: TrainConfig) -> Sampling:
    return Sampling(options.samples, options.objective_variant, options.negatives, options.seed)


# --------------------------------------------------------------------------------------- equal before they are timed


Gradients = dict[str, Tensor]  # on the CPU


def take_gradients(model: torch.nn.Module) -> Gradients:
    """The model's gradients whole and on the CPU; they are removed from the model."""
    taken = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        taken[name] = grad.detach().float().cpu()
    model.zero_grad()
    return taken


def agrees(name: str, found: tuple[float, Gradients], expected: tuple[float, Gradients], tolerance: float) -> bool:
    """Prints the errors of the loss and of the gradient that is furthest off, relative to their norms."""
    loss_error = abs(found[0] - expected[0]) / abs(expected[0])
    errors = {n: float((found[1][n] - g).norm() / g.norm()) for n, g in expected[1].items()}
    worst = max(errors, key=lambda n: errors[n])
    ok = loss_error <= tolerance and errors[worst] <= tolerance  # false for NaN
    print(f"equal to the padded reference within {tolerance:g}? {name}: loss {loss_error:.1e}, "
          f"gradients {errors[worst]:.1e} ({worst}): {'yes' if ok else 'NO'}", flush=True)  # fmt: skip
    return ok


def references(model: padded.Padded, pairs: list[TokenizedPair]) -> dict[str, tuple[float, Gradients]]:
    """(mean loss, gradients) of the padded reference, the same with checkpointing, and of TRL's ranking loss."""
    found = {}
    for name, checkpointing in (("naive", False), ("naive, checkpointing", True)):
        model.checkpointing(checkpointing)
        loss = model.loss(pairs) / len(pairs)
        loss.backward()
        found[name] = float(loss.detach()), take_gradients(model.model)
    model.checkpointing(False)
    if not agrees("naive, checkpointing", found.pop("naive, checkpointing"), found["naive"], TOLERANCE[model.dtype]):
        refuse()
    if not padded.trl_missing():
        loss = padded.trl_gradients(model, pairs)
        found["TRL"] = float(loss), take_gradients(model.model)
    return found


def check(ours: Ours, expected: dict[str, tuple[float, Gradients]], batch: Groups, tolerance: float) -> bool:
    """Every form of ours against the padded reference, and without the contrastive loss against TRL's ranking loss."""

    def run(without: str = "") -> tuple[float, Gradients]:
        sums = ours.accumulate(ours.packs(batch, without), len(flat(batch)), without)
        return sums[0].item() / len(flat(batch)), take_gradients(ours.model)

    # One after the other: the gradients of a large model fill the host's memory.
    results = [agrees(OURS, run(), expected["naive"], tolerance)]
    results += [agrees(f"ours without {lever}", run(lever), expected["naive"], tolerance) for lever in LEVERS]
    results += [agrees(f"ours, {form}", run(form), expected["naive"], tolerance) for form in RECOMPUTING]
    if "TRL" in expected:
        with mock.patch.object(ours, "objective", replace(ours.objective, contrastive_weight=0.0)):
            results.append(agrees("ranking loss, against TRL", run(), expected["TRL"], tolerance))
    return all(results)


def refuse() -> NoReturn:
    print("the contestants do not compute the same: nothing is timed", file=sys.stderr)
    sys.exit(1)


# -------------------------------------------------------------------------------------------------- who takes part


@dataclass(frozen=True)
class Contestant:
    """Somebody who does optimizer steps on global batches."""

    name: str
    batches: list[Groups]
    run: Callable[[list[Groups]], list[float]]  # seconds of each step
    peak: Callable[[Groups], int]  # bytes of one step
    work: Callable[[Groups], Work]
    notes: dict[str, Any]


def timed(step: Callable[[Groups], None], device: torch.device) -> Callable[[list[Groups]], list[float]]:
    def run(batches: list[Groups]) -> list[float]:
        clock = [measure.now(device)]
        for batch in batches:
            step(batch)
            clock.append(measure.now(device))
        return np.diff(clock).tolist()

    return run


def weighed(step: Callable[[Groups], None], device: torch.device) -> Callable[[Groups], int]:
    def peak(batch: Groups) -> int:
        with measure.recorded_peak(device) as found:
            step(batch)
        return found.bytes

    return peak


def our_contestants(ours: Ours, batches: dict[int, list[Groups]]) -> Iterator[Contestant]:
    """Ours, ours without each lever, and with each number of pairs a prompt in ``batches`` above one."""
    config, device = ours.model.config, ours.device
    forms = [(OURS, "", 1)] + [(f"ours without {lever}", lever, 1) for lever in LEVERS]
    forms += [(f"ours, {form}", form, 1) for form in RECOMPUTING]
    forms += [(f"ours, up to {size} pairs a prompt", "", size) for size in batches if size > 1]
    for name, without, group in forms:
        # On a GPU workers build packs ahead, into pinned memory; on a CPU the trainer builds them in between.
        ahead = {
            id(b): [p.pin_memory() for p in ours.packs(b, without)] for b in batches[group] if device.type == "cuda"
        }

        def step(batch: Groups, without: str = without, ahead: dict[int, list[Pack]] = ahead) -> None:
            ours.step(ahead.get(id(batch)) or ours.packs(batch, without), len(flat(batch)), without)

        def work(batch: Groups, without: str = without) -> Work:
            return packed_work(config, ours.packs(batch, without))

        yield Contestant(name, batches[group], timed(step, device), weighed(step, device), work, {})


def naive_contestant(
    model: padded.Padded, config: ModelConfig, batches: list[Groups], name: str, size: int, bucketed: bool,
    checkpointing: bool,
) -> Contestant:  # fmt: skip
    def step(batch: Groups) -> None:
        model.checkpointing(checkpointing)
        model.step(flat(batch), size, bucketed)

    def work(batch: Groups) -> Work:
        return padded_work(config, padded.cut(flat(batch), size, bucketed))

    notes = {"micro-batch": size, "attention": model.attention}
    return Contestant(name, batches, timed(step, model.device), weighed(step, model.device), work, notes)


def trl_contestant(
    model: padded.Padded, config: ModelConfig, batches: list[Groups], as_shipped: bool
) -> Contestant:  # fmt: skip
    def run(batches: list[Groups]) -> list[float]:
        return padded.trl_steps(model, [flat(b) for b in batches], PAIRS, as_shipped).seconds

    def peak(batch: Groups) -> int:
        return padded.trl_steps(model, [flat(batch)], PAIRS, as_shipped, with_memory=True).peaks[0].bytes

    def work(batch: Groups) -> Work:
        return padded_work(config, padded.cut(flat(batch), PAIRS, False))

    first = padded.trl_steps(model, [flat(batches[0])[:1]], PAIRS, as_shipped)
    notes = {"micro-batch": PAIRS, "attention": model.attention, "checkpointing": first.checkpointing}
    return Contestant(TRL_SHIPPED if as_shipped else TRL, batches, run, peak, work, notes)


def padded_contestants(model: padded.Padded, config: ModelConfig, batches: list[Groups]) -> Iterator[Contestant]:
    """What people run: naive at 8 pairs, with checkpointing, at its best; TRL in both settings."""
    yield naive_contestant(model, config, batches, NAIVE, PAIRS, False, False)
    yield naive_contestant(model, config, batches, f"{NAIVE}, checkpointing", PAIRS, False, True)
    sizes = [size for size in SIZES if size <= len(flat(batches[0]))]
    tried = {size: naive_contestant(model, config, batches, f"naive, by length, {size} pairs", size, True, False)
             for size in sizes}  # fmt: skip
    seconds = {size: attempt(lambda c=c: c.run(batches[:1])[0], model.device) for size, c in tried.items()}
    print("naive by length, seconds a step with n pairs a micro-batch:", seconds, flush=True)
    fitting = {size: taken for size, taken in seconds.items() if isinstance(taken, float)}
    if fitting:
        yield tried[min(fitting, key=lambda size: fitting[size])]
    if not padded.trl_missing():
        yield trl_contestant(model, config, batches, as_shipped=False)
        yield trl_contestant(model, config, batches, as_shipped=True)


def attempt(function: Callable[[], Any], device: torch.device) -> Any:
    """The function's value, or 'out of memory'."""
    try:
        return function()
    except torch.OutOfMemoryError:
        pass
    if device.type == "cuda":  # outside of the handler, which holds the frames that hold the tensors
        torch.cuda.empty_cache()
    return "out of memory"


# -------------------------------------------------------------------------------------------------------- the rounds


def race(contestants: list[Contestant], rounds: int, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row for each contestant. They take turns; the machine's rate of matrix products is measured in every round."""
    rows: dict[str, dict[str, Any]] = {}
    for c in contestants:
        first = [[flat(c.batches[0])[:1]]]
        attempt(lambda c=c, first=first: c.run(first), device)  # creates optimizer state, loads kernels
        rows[c.name] = {"method": c.name, **c.notes, "peak": attempt(lambda c=c: c.peak(c.batches[0]), device)}
    running = [c for c in contestants if rows[c.name]["peak"] != "out of memory"]
    seconds: dict[str, list[list[float]]] = {c.name: [] for c in running}
    rates = []
    for i in range(rounds):
        rates.append(accounting.matmul_rate(device, dtype))
        for c in list(running):
            taken = attempt(lambda c=c: c.run(c.batches), device)
            if isinstance(taken, str):
                rows[c.name]["peak"] = taken
                running.remove(c)
            else:
                seconds[c.name].append(taken)
        print(f"round {i + 1} of {rounds}", flush=True)
    rates.append(accounting.matmul_rate(device, dtype))
    for c in running:
        rows[c.name] |= summary(c, np.array(seconds[c.name]), float(np.median(rates)), device)
    return list(rows.values())


def summary(c: Contestant, seconds: np.ndarray, matmul: float, device: torch.device) -> dict[str, Any]:
    """Speed from seconds [rounds, steps]."""
    pairs = np.array([len(flat(batch)) for batch in c.batches])
    total = float(np.median(seconds, axis=0).sum())
    rates = np.percentile(pairs / seconds, [10, 90])
    work = [c.work(batch) for batch in c.batches]
    flops = sum(w.flops for w in work) / total
    sequence_tokens = sum(len(p.chosen_ids) + len(p.rejected_ids) for batch in c.batches for p in flat(batch))
    return {
        "pairs/s": float(pairs.sum()) / total, "p10": float(rates[0]), "p90": float(rates[1]),
        "sequence tokens/s": sequence_tokens / total, "computed/pair": sum(w.tokens for w in work) / float(pairs.sum()),
        "GFLOP/s": flops / 1e9, "matmul GFLOP/s": matmul / 1e9, "% matmul": 100 * flops / matmul,
        "MFU %": 100 * flops / accounting.peak_flops(device, torch.bfloat16)[0] if device.type == "cuda" else None,
        "seconds": seconds.tolist(),
    }  # fmt: skip


def compare(names: Sequence[str], config: ModelConfig, options: TrainConfig, steps: int, rounds: int,
            dtype: torch.dtype, mesh: DeviceMesh, device: torch.device) -> list[dict[str, Any]]:  # fmt: skip
    """All contestants on the records of each name. Exits with 1, timing nothing, where they do not compute the same."""
    batches: dict[str, dict[int, list[Groups]]] = {}
    for name in names:
        pairs = records.records(name, steps * options.global_batch_pairs)
        batches[name] = {size: global_batches(pairs, options, size) for size in group_sizes(pairs)}
    checked = [[pair] for pair in flat(batches[names[0]][1][0])[:CHECKED_PAIRS]]
    if dtype != torch.float32:  # where rounding hides nothing
        equal_to_padded(config, options, checked, torch.float32, mesh, device)
        release(device)
    ours = equal_to_padded(config, options, checked, dtype, mesh, device)
    rows: dict[str, list[dict[str, Any]]] = {}
    if fits_together(ours.model, device):
        model = padded_model(config, options, dtype, device)
        for name, of in batches.items():
            people = list(padded_contestants(model, config, of[1]))
            rows[name] = race([*people, *our_contestants(ours, of)], rounds, device, dtype)
    else:
        print("two models do not fit: ours and the padded ones run one after the other", flush=True)
        for name, of in batches.items():
            rows[name] = race(list(our_contestants(ours, of)), rounds, device, dtype)
        del ours
        release(device)
        model = padded_model(config, options, dtype, device)
        for name, of in batches.items():
            rows[name] = race(list(padded_contestants(model, config, of[1])), rounds, device, dtype) + rows[name]
    return [finished(row, mine, name, device) for name, mine in rows.items() for row in mine]


def padded_model(config: ModelConfig, options: TrainConfig, dtype: torch.dtype, device: torch.device) -> padded.Padded:
    return padded.Padded(config, options, prepare.objective_of(options), sampling_of(options), dtype, device)


def equal_to_padded(config: ModelConfig, options: TrainConfig, batch: Groups, dtype: torch.dtype, mesh: DeviceMesh,
                    device: torch.device) -> Ours:  # fmt: skip
    """Ours, after it gave the loss and gradients of the padded reference; one of the two is in memory at a time."""
    expected = references(padded_model(config, options, dtype, device), flat(batch))
    release(device)
    # Checked with float32 weights: bfloat16 ones start elsewhere.
    ours = Ours(config, replace(options, optimizer="adamw"), dtype, mesh, device)
    if not check(ours, expected, batch, TOLERANCE[dtype]):
        refuse()
    if options.optimizer == "adamw":
        return ours
    del ours
    release(device)
    return Ours(config, options, dtype, mesh, device)


def global_batches(pairs: list[TokenizedPair], options: TrainConfig, group_prompts: int) -> list[Groups]:
    keys = np.array([pair.prompt_key for pair in pairs])
    batches = epoch_batches(keys, options.global_batch_pairs, group_prompts, options.seed, 0)
    return [[[pairs[i] for i in group] for group in batch] for batch in batches]


def group_sizes(pairs: list[TokenizedPair]) -> list[int]:
    """1, and 4 and 16 where prompts have more than one pair."""
    repeated = len({pair.prompt_key for pair in pairs}) < len(pairs)
    return [1, 4, 16] if repeated else [1]


def fits_together(model: torch.nn.Module, device: torch.device) -> bool:
    """Whether weights, gradients and moments of two models leave half of the memory for activations."""
    parameters = sum(p.numel() for p in model.parameters())
    return device.type == "cpu" or 2 * 16 * parameters < torch.cuda.get_device_properties(device).total_memory / 2


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def finished(row: dict[str, Any], rows: list[dict[str, Any]], name: str, device: torch.device) -> dict[str, Any]:
    """The row with its ratios to the others."""
    rate = {r["method"]: r.get("pairs/s") for r in rows}
    mine = row.get("pairs/s")
    ratios = {f"x {label}": mine / rate[method] if mine and rate.get(method) else None
              for label, method in (("naive", NAIVE), ("TRL", TRL), ("TRL shipped", TRL_SHIPPED))}  # fmt: skip
    peak = row.pop("peak")
    memory = {"note": peak} if isinstance(peak, str) else {"peak MB": peak / 1e6}
    return {"data": name, **row, **ratios, **memory}


# ----------------------------------------------------------------------------------------------------------- scaling


def scaling(ours: Ours, seconds: float, largest: int) -> list[dict[str, Any]]:
    """Forward + backward of one pack as it grows, and as more pairs share a prompt."""
    config = ours.model.config
    cases: list[tuple[str, int, Groups]] = []
    pool = records.records("gsm8k_pairs", 256)
    sizes = [packing.group_size([pair]).tokens for pair in pool]
    for thousands in (1, 2, 4, 8, 16, 32):
        if thousands <= largest:
            count = int(np.searchsorted(np.cumsum(sizes), 1000 * thousands))
            cases.append(("tokens a pack (thousands)", thousands, [[pair] for pair in pool[:count]]))
    for prompt, completion in ((100, 225), (250, 80)):
        for n in (1, 2, 4, 8, 16):
            pairs = [records.random_pair(i, i // n, prompt, completion, completion) for i in range(16)]
            what = f"pairs sharing a prompt of {prompt}, completions of {completion}"
            cases.append((what, n, [pairs[i : i + n] for i in range(0, 16, n)]))
    rows = []
    for what, n, groups in cases:
        pack = build_pack(groups, ours.sampling, 0)

        def step(pack: Pack = pack) -> None:
            ours.accumulate([pack], pack.n_pairs)
            ours.model.zero_grad()

        spent = measure.times({"step": step}, ours.device, seconds)["step"][0] / 1000
        work = packed_work(config, [pack])
        rows.append({
            "what": what, "n": n, "tokens": work.tokens, "ms": 1000 * spent, "us/token": 1e6 * spent / work.tokens,
            "pairs/s": pack.n_pairs / spent, "GFLOP/s": work.flops / spent / 1e9,
            "peak MB": measure.peak_memory(step, ours.device) / 1e6,
        })  # fmt: skip
        print(measure.table(rows[-1:], SCALING_COLUMNS), flush=True)
    return rows


# ----------------------------------------------------------------------------------------------------------- profile


def profiled(ours: Ours, batch: Groups) -> list[dict[str, Any]]:
    """The operators (CPU) or kernels (CUDA) of one step of ours, by the time that is their own, largest first."""
    cuda = ours.device.type == "cuda"
    ours.step(ours.packs(batch), len(flat(batch)))
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as recorded:
        ours.step(ours.packs(batch), len(flat(batch)))
        measure.now(ours.device)
    spent: dict[str, list[float]] = {}
    for event in recorded.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        if on_gpu == cuda and time > 0:
            spent.setdefault(event.key, [0.0, 0.0])
            spent[event.key][0] += time
            spent[event.key][1] += event.count
    total = sum(time for time, _ in spent.values())
    rows = [{"kernel": name[:90], "ms": time / 1000, "%": 100 * time / total, "calls": int(calls)}
            for name, (time, calls) in spent.items()]  # fmt: skip
    return sorted(rows, key=lambda row: -row["ms"])


FUSED_KERNELS = ("_add_rows_kernel", *(f"_{op}_{way}_kernel" for op in ("contrastive", "rms_norm", "swiglu")
                                       for way in ("forward", "backward")))  # fmt: skip


def missing_kernels(rows: list[dict[str, Any]]) -> list[str]:
    """Our kernels that a profile on a GPU does not show."""
    names = {row["kernel"] for row in rows}
    return [kernel for kernel in FUSED_KERNELS if kernel not in names]


# ------------------------------------------------------------------------------------------------------------ output


def verdict(rows: list[dict[str, Any]]) -> str:
    """One line: ours against TRL in both settings and against naive, on each data set."""
    parts = []
    for row in rows:
        if row["method"] == OURS and row.get("pairs/s"):
            ratios = [f"{row[f'x {label}']:.1f} times {text}" for label, text in
                      (("TRL", "TRL without checkpointing"), ("TRL shipped", "TRL as shipped"), ("naive", "naive"))
                      if row[f"x {label}"]]  # fmt: skip
            parts.append(f"{row['data']}: {row['pairs/s']:.1f} pairs/s, {', '.join(ratios) or 'nothing to compare'}, "
                         f"{row['% matmul']:.0f}% of the measured matmul rate")  # fmt: skip
    return "; ".join(parts) or "no verdict: ours did not run"


def plot(rows: list[dict[str, Any]], path: str, title: str) -> None:
    """Bars of pairs/s and of peak memory, a colour for each data set."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    names = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(13, 0.45 * len(methods) + 1.5), layout="constrained", sharey=True)
    for axis, column in zip(axes, ("pairs/s", "peak MB"), strict=True):
        for i, name in enumerate(names):
            values = {row["method"]: row.get(column) or 0.0 for row in rows if row["data"] == name}
            places = [k + (i - (len(names) - 1) / 2) * 0.8 / len(names) for k in range(len(methods))]
            axis.barh(places, [values.get(method, 0.0) for method in methods], 0.8 / len(names), label=name)
        axis.set(xlabel=column, yticks=range(len(methods)), yticklabels=methods)
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_scaling(rows: list[dict[str, Any]], path: str, title: str) -> None:
    """Time of a token against tokens a pack, pairs/s against pairs a prompt."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        by_size = what.startswith("tokens")
        axis, column = (axes[0], "us/token") if by_size else (axes[1], "pairs/s")
        axis.plot([row["n"] for row in mine], [row[column] for row in mine], "o-", label=what)
        axis.set(xscale="log", xlabel=what if by_size else "pairs sharing a prompt", ylabel=column, ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="default: 1b on CUDA, else tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--data", nargs="+", choices=records.DATA, default=records.DATA, help="default: both")
    parser.add_argument("--global-batch", type=int, help=f"pairs a step, a multiple of {PAIRS}; default: 32, "
                        "64 on CUDA")  # fmt: skip
    parser.add_argument("--tokens-per-batch", type=int, default=TrainConfig().tokens_per_batch,
                        help="most tokens of a pack, default: the trainer's")  # fmt: skip
    parser.add_argument("--steps", type=int, help="different global batches; default: 3, 8 on CUDA")
    parser.add_argument("--rounds", type=int, default=3, help="times that each contestant does them")
    parser.add_argument("--optimizer", choices=accounting.OPTIMIZER_BYTES, default="adamw", help="of ours")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of ours")
    parser.add_argument("--quick", action="store_true",
                        help=f"one round; on a CPU one global batch of {PAIRS} pairs of each data set")  # fmt: skip
    parser.add_argument("--scaling", action="store_true", help="only how ours scales with packs and shared prompts")
    parser.add_argument("--profile", action="store_true", help="only the costliest operators or kernels of a step")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    options.model = options.model or ("1b" if cuda else "tiny")
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    options.global_batch = options.global_batch or (64 if cuda else PAIRS if options.quick else 32)
    options.steps = options.steps or ((3 if options.quick else 8) if cuda else (1 if options.quick else 3))
    options.rounds = 1 if options.quick else options.rounds
    if options.global_batch % PAIRS:
        parser.error(f"--global-batch {options.global_batch}: must be a multiple of {PAIRS}")
    return options


def main() -> None:
    options = arguments()
    train.keep_freed_memory()
    config, dtype = MODELS[options.model], getattr(torch, options.dtype)
    settings = TrainConfig(
        lr=1e-5, global_batch_pairs=options.global_batch, tokens_per_batch=options.tokens_per_batch,
        optimizer=options.optimizer, compile=options.compile,
    )  # fmt: skip
    with parallel.process_group() as (mesh, device):
        where = measure.environment(device)
        print(", ".join(f"{k} {v}" for k, v in where.items()))
        rates = {d: accounting.matmul_rate(device, getattr(torch, d)) for d in ("float32", "bfloat16")}
        print("measured matmul rate:", ", ".join(f"{d} {r / 1e9:.0f} GFLOP/s" for d, r in rates.items()))
        about = {"model": options.model, "dtype": options.dtype, "optimizer of ours": options.optimizer,
                 "compiled": options.compile, "records": records.source(),
                 "global batch": options.global_batch, "tokens a pack": options.tokens_per_batch,
                 **{f"matmul {d} GFLOP/s": r / 1e9 for d, r in rates.items()}}  # fmt: skip
        print(", ".join(f"{k} {v}" for k, v in about.items() if not k.startswith("matmul")), flush=True)
        name = f"train_step-{options.model}-{options.dtype}"
        title = f"{options.model}, {options.dtype}, {where['device']}, {where['date']}"
        if options.scaling:
            ours = Ours(config, settings, dtype, mesh, device)
            rows = scaling(ours, 0.5 if options.quick else 2.0, 8 if options.quick else 32)
            print(measure.table(rows, SCALING_COLUMNS))
            stem = measure.record(f"{name}-scaling", [{**row, **about} for row in rows], where)
            plot_scaling(rows, f"{stem}.png", title)
        elif options.profile:
            ours = Ours(config, settings, dtype, mesh, device)
            batch = global_batches(records.records(options.data[0], options.global_batch), settings, 1)[0]
            rows = profiled(ours, batch)
            print(measure.table(rows[:30], ("kernel", "ms", "%", "calls")))
            stem = measure.record(f"{name}-profile", [{**row, **about} for row in rows[:30]], where)
            if device.type == "cuda" and (missing := missing_kernels(rows)):
                print(f"not in the profile: {', '.join(missing)}: the fused loss did not run", file=sys.stderr)
                sys.exit(1)
        else:
            if padded.trl_missing():
                print(f"TRL is left out: {padded.trl_missing()}")
            rows = compare(options.data, config, settings, options.steps, options.rounds, dtype, mesh, device)
            print(measure.table(rows, COLUMNS))
            for row in rows:
                if "note" in row:
                    print(f"{row['data']}, {row['method']}: {row['note']}")
            stem = measure.record(name, [{**row, **about} for row in rows], where)
            plot(rows, f"{stem}.png", title)
            print(verdict(rows))
        print(f"written: {stem}.*")


if __name__ == "__main__":
    main()
