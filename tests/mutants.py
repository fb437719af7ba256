"""Plants known faults, one at a time, in a copy of the project; each must turn a named test red (`make mutants`).

A mutant is (file, text, replacement, test to run: a file, and after " -k " which of its tests). The text must occur
exactly once, so that a mutant cannot go stale unnoticed. Exit code 1 if a fault goes unseen, or if a test is red
without one.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INVARIANTS, OBJECTIVES, PARITY = "tests/test_invariants.py", "tests/test_objectives.py", "tests/test_parity.py"
PACKING, DATA, ARITHMETIC = (f"tests/test_{name}.py" for name in ("packing", "data", "arithmetic"))
TRAIN = "tests/test_train.py -k processes"
BENCH = "tests/test_bench.py -k "
KERNELS = "tests/test_kernels.py -k "
GATHER, TILES = KERNELS + "gather", KERNELS + "tiles"
ANALYTIC, TRITON = (KERNELS + f"({path}-5-64 or {path}-16-200 or {path}-33 or eps) and not {other}"
                    for path, other in (("pytorch", "triton"), ("triton", "pytorch")))  # fmt: skip
DENSE_ANALYTIC, DENSE_TRITON = (
    KERNELS + f"dense_loss and not any_lengths and {path}" for path in ("pytorch", "triton")
)
Q_TRITON = KERNELS + "q_values and triton"
CONTRASTIVE, SAMPLED, DENSE, DENSE_KERNELS, Q_KERNEL = (
    f"kernels/gcrm_kernels/{name}.py"
    for name in ("contrastive", "triton_contrastive", "dense", "triton_dense", "triton_qvalues")
)

MUTANTS = {
    "position off by one after a shared prefix": (
        "gcrm_fast/packing.py", "np.arange(start, len(sequence))", "np.arange(start, len(sequence)) + (start > 0)",
        INVARIANTS),
    "segment boundary moved": (
        "gcrm_fast/packing.py", "self.q_lens.append(len(own))", "self.q_lens.append(len(own) - (i == 1) + (i == 0))",
        INVARIANTS),
    "gathered rows scattered instead of added": (
        "kernels/gcrm_kernels/gather.py", ".index_add_(0, index, exact)", ".index_copy_(0, index, exact)", GATHER),
    "inverse index in the wrong order": (
        "kernels/gcrm_kernels/gather.py", "out=offsets[1:]", "out=offsets[:-1]", PACKING),
    "margin dropped": (
        "gcrm_fast/objectives.py", "reward_2N[1] - margin_N", "reward_2N[1]", OBJECTIVES),
    "scatter instead of add": (
        CONTRASTIVE, "out_RH.index_add_(0, index_I, values_IH)", "out_RH.index_copy_(0, index_I, values_IH)",
        OBJECTIVES),
    "negative term with the wrong sign": (
        CONTRASTIVE, "cosine.new_tensor([1.0, -1.0])", "cosine.new_tensor([1.0, 1.0])", OBJECTIVES),
    "temperature applied twice": (
        CONTRASTIVE, "x = cosine * (sign / temperature)", "x = cosine * (sign / temperature**2)", OBJECTIVES),
    "positive term kept for a completion of one token": (
        CONTRASTIVE, "loss_2N.mul(counted_2N).sum(0)", "loss_2N.sum(0)", OBJECTIVES),
    "cosines in half precision": (
        CONTRASTIVE, "norms_4NS = hidden_RH.new_empty((2, 2, n, s), dtype=dtype)",
        "norms_4NS = hidden_RH.new_empty((2, 2, n, s), dtype=hidden_RH.dtype)", OBJECTIVES),
    "goals' own share taken for sources": (
        CONTRASTIVE, "torch.stack([share.sum(-1), share.sum(-2)])", "torch.stack([share.sum(-2), share.sum(-1)])",
        ANALYTIC),
    "gradient through a clamped norm": (CONTRASTIVE, ".mul_(norms_4NS > EPS)", "", ANALYTIC),
    "reference without its clamp": (
        "kernels/gcrm_kernels/reference.py", ".clamp_min(EPS * EPS).sqrt()", ".sqrt()", ANALYTIC),
    "a unit missing from a tile": (
        CONTRASTIVE, "np.searchsorted(tile, np.arange(len(starts)))",
        "np.searchsorted(tile, np.arange(len(starts)) + 1)", TILES),
    "tiles built on the device off by one": (
        CONTRASTIVE, "F.pad(position, (1, 0))[before]", "F.pad(position, (1, 0), value=1)[before]", TILES),
    "kernel: padding samples counted": (
        SAMPLED, "similarity = tl.sum(tl.where(counted, cosine, 0.0)) / count",
        "similarity = tl.sum(cosine) / (SP * SP)", TRITON),
    "kernel: repeated rows added once": (
        SAMPLED, "named & (s[None, :] < slot[:, None])", "named & (s[None, :] < 0)", TRITON),
    "kernel: last row of a tile not written": (
        SAMPLED, "inside = (r < end)[:, None] & (h < width)[None, :]",
        "inside = (r < end - 1)[:, None] & (h < width)[None, :]", TRITON),
    "kernel: gradient of goals with the strides of sources": (
        SAMPLED, "goal, source, 1, S, grad", "goal, source, S, 1, grad", TRITON),
    "kernel: negatives without their gradient": (SAMPLED, "* direction * has_term", "* has_term", TRITON),
    "dense: negatives weighed like positives": (
        DENSE, "(1 / ((b - a) * (c - b)))", "(1 / (b - a) ** 2)", DENSE_ANALYTIC),
    "dense kernel: a lone position takes part in a positive": (
        DENSE_KERNELS, "tl.where(l_c > 1.0, 2.0 / tl.maximum(l_c * (l_c - 1.0), 1.0), 0.0)", "2.0 / (l_c * l_c)",
        DENSE_TRITON),
    "dense kernel: a turn starts at the first tile": (
        DENSE_KERNELS, "i = a + (first_tile + slot % tiles) * TILE", "i = a + (slot % tiles) * TILE", DENSE_TRITON),
    "dense kernel: the last pair of a turn skipped": (
        DENSE_KERNELS, "min(pairs, n - first_pair)", "min(pairs, n - first_pair - 1) or 1", DENSE_TRITON),
    "Q-values of goals that are not unit vectors": (
        Q_KERNEL, "q = dots * largest[None, :]", "q = dots", Q_TRITON),
    "dense: rejected positions before the divergence": (
        "gcrm_fast/packing.py", "positions = [chosen, rejected[negative_goals]]", "positions = [chosen, rejected]",
        PACKING),
    "causal mask aligned top-left": (
        "gcrm_fast/attention.py", "(q + (k_len - q_len)).unsqueeze(-1)", "(q + 0 * k_len).unsqueeze(-1)",
        INVARIANTS),
    "padded queries counted in the backward": (
        "gcrm_fast/attention.py", "grad = grad * real_q[:, None, None, :, None]", "grad = grad * 1", INVARIANTS),
    "read rows shifted": (
        "gcrm_fast/model.py", "prune=i == len(self.layers) - 1", "prune=i == 0", INVARIANTS),
    "wrong rotary pairing": (
        "gcrm_fast/model.py", "torch.cat((-b, a), dim=-1)", "torch.cat((b, -a), dim=-1)", PARITY),
    "llama3 rope not interpolated": (
        "gcrm_fast/model.py", "torch.where(between, smooth, scaled)", "scaled", PARITY),
    "norm epsilon of another model": (
        "gcrm_fast/checkpoint.py", '"rms_norm_eps": config.rms_norm_eps', '"rms_norm_eps": 0.1', PARITY),
    "reward scaled by a sigmoid in servers": (
        "gcrm_fast/checkpoint.py", '"problem_type": "regression",', "", PARITY),
    "pad equal to eos": (
        "gcrm_fast/checkpoint.py", " and token != tokenizer.eos_token", "", PARITY),
    "missing trunk tensor re-initialised": (
        "gcrm_fast/checkpoint.py", 'if key not in found and name.startswith("model."):', "if False:", PARITY),
    "goal not strictly after its source": (
        "gcrm_fast/packing.py", "i, j + (j >= i)", "i, j", PACKING),
    "sampling depends on the epoch only": (
        "gcrm_fast/packing.py", "counter=[0, 0, 0, pair.pair_id]", "counter=[0, 0, 0, 0]", PACKING),
    "negatives before the divergence": (
        "gcrm_fast/packing.py", 'if sampling.negatives == "after-divergence" else 0', "if False else 0", PACKING),
    "a pair lost at a batch boundary": (
        "gcrm_fast/packing.py", "rest[room:], room - len(batch[-1])",
        "rest[room + 1 :], room - len(batch[-1])", PACKING),
    "eos not appended": (
        "gcrm_fast/data.py", "[*ids, eos]", "[*ids]", DATA),
    "error step recorded wrongly": (
        "gcrm_fast/arithmetic.py", "number == wrong_step", "number == 1", ARITHMETIC),
    "one rank's scale wrong": (
        "gcrm_fast/train.py", "dist.get_world_size() / n_pairs", "(1 + dist.get_rank()) / n_pairs", TRAIN),
    "every rank trains on the same packs": (
        "gcrm_fast/train.py", "for p in plan[rank::world_size]", "for p in plan[0::world_size]", TRAIN),
    "benchmark: the reference reads negative goals on the chosen completion": (
        "bench/padded.py", "torch.tensor([0, 0, 0, n])", "torch.tensor([0, 0, 0, 0])", BENCH + "lever"),
    "benchmark: sharing not removed": (
        "bench/train_step.py", 'return_value=0) if without == "sharing"', 'return_value=0) if without == "none"',
        BENCH + "lever"),
    "benchmark: differences in gradients pass": (
        "bench/train_step.py", "ok = loss_error <= tolerance and errors[worst] <= tolerance",
        "ok = loss_error <= tolerance", BENCH + "lever"),
    "benchmark: FLOPs of the last layer counted for all tokens twice": (
        "bench/train_step.py", "(layers - 1) * tail", "layers * tail", BENCH + "flops"),
    "benchmark: medians over steps and not over rounds": (
        "bench/train_step.py", "np.median(seconds, axis=0)", "np.median(seconds, axis=1)", BENCH + "speed"),
    "README's GPU table from the oldest file": (
        "bench/gpu.py", "key=lambda p: (p.stem[-10:], p.stem))", "key=lambda p: (p.stem[-10:], p.stem), reverse=True)",
        BENCH + "newest"),
}  # fmt: skip


def is_red(folder: Path, test: str) -> bool:
    paths = f"{folder}{os.pathsep}{folder / 'kernels'}"
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    file, _, selected = test.partition(" -k ")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", selected]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    return result.returncode == 1


def main() -> int:
    wanted = " ".join(sys.argv[1:])
    mutants = {name: m for name, m in MUTANTS.items() if wanted in name}
    unseen = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "project"
        shutil.copytree(
            ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "*.egg-info", "__pycache__")
        )
        for test in sorted({m[3] for m in mutants.values()}):
            if is_red(folder, test):
                print(f"{test} is red without any fault")
                return 1
        for name, (file, text, replacement, test) in mutants.items():
            path = folder / file
            source = path.read_text()
            if source.count(text) != 1:
                print(f"stale    {name}: the text occurs {source.count(text)} times in {file}")
                unseen.append(name)
                continue
            path.write_text(source.replace(text, replacement))
            red = is_red(folder, test)
            path.write_text(source)
            print(f"{'red     ' if red else 'UNSEEN  '} {name} ({test})", flush=True)
            if not red:
                unseen.append(name)
    print(f"{len(mutants) - len(unseen)} of {len(mutants)} planted faults turn a test red")
    return int(bool(unseen))


if __name__ == "__main__":
    sys.exit(main())
