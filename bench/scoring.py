"""Scoring completions: ours against transformers' padded AutoModelForSequenceClassification, in one process.

    python bench/scoring.py [--model tiny|135m|1b|8b] [--dtype float32|bfloat16] [--quick]

padded          batches in the order of the records, at the batch size that is fastest here
padded, sorted  all completions sorted by length first, longest batch first, at its best batch size
ours            RewardModel.judge: packs without padding, each prompt once, the last layer's tail at end rows only

Each scores 1, 8 and 50 completions per prompt, in random order, with the lengths of GSM8K answers (real text with
GCRM_DATA) and of HH dialogues. Token ids, weights and dtype are the same for all; packing and padding are timed,
tokenization is not. Rewards are compared first, in float32 and in the timed dtype; if they differ, nothing is timed.
Contestants take turns. completions/s is that of the median time, with its 10th and 90th percentile; "least work" is how
much faster ours would be than a model without any padding if only tokens counted; peak memory is beyond the weights.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForSequenceClassification

import drawn
import measure
import padded
import records
from gcrm_fast import train
from gcrm_fast.data.encoding import Completion
from gcrm_fast.data.ends import End
from gcrm_fast.data.tokenization import train_tokenizer
from gcrm_fast.inference.scoring import RewardModel
from gcrm_fast.model.llama import ModelConfig
from our_step import MODELS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EACH = (1, 8, 50)  # completions per prompt
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)  # the padded contestants take the fastest
GPU_BATCHES = BATCHES[3:]  # smaller ones take minutes there
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of the rewards, in their standard deviations
COLUMNS = (
    "data",
    "per prompt",
    "method",
    "batch",
    "completions/s",
    "p10",
    "p90",
    "x padded",
    "x sorted",
    "least work",
    "tokens/s",
    "computed/completion",
    "peak MB",
)
PADDED, SORTED, OURS = "padded", "padded, sorted", "ours"
SEED = 0


# ------------------------------------------------------------------------------------------------------ contestants


@torch.inference_mode()
def padded_rewards(
    model: LlamaForSequenceClassification, encoded: Sequence[Completion], size: int, is_sorted: bool
) -> np.ndarray:
    """Rewards [N] float32, in the order of ``encoded``."""
    order = np.arange(len(encoded))
    if is_sorted:
        order = np.argsort([-len(completion.ids) for completion in encoded], kind="stable")
    rewards = np.empty(len(encoded), dtype=np.float32)
    pending = []
    for a in range(0, len(order), size):
        part = order[a : a + size]
        ids_BL = pad_sequence(
            [torch.from_numpy(encoded[i].ids).long() for i in part], batch_first=True, padding_value=records.PAD
        )
        ids_BL = ids_BL.to(model.device)
        pending.append((part, model(ids_BL, attention_mask=ids_BL != records.PAD).logits[:, 0]))
    for part, rewards_B in pending:  # read last, like ours: nothing waits for the device earlier
        rewards[part] = rewards_B.float().cpu().numpy()
    return rewards


def our_rewards(model: RewardModel, encoded: Sequence[Completion]) -> np.ndarray:
    return np.array([judged.reward for judged in model.judge(encoded)], dtype=np.float32)


def padded_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> LlamaForSequenceClassification:
    model, _ = padded.classifier(config, SEED, dtype, device)
    return model.eval().to(dtype)


def our_model(config: ModelConfig, dtype: torch.dtype, device: torch.device, tokens: int) -> RewardModel:
    network = drawn.network(config, SEED, device, dtype).eval().requires_grad_(False)
    return RewardModel(network, train_tokenizer(["text"], 259), device, "", {}, tokens, End())


def computed_tokens(encoded: Sequence[Completion], size: int, is_sorted: bool) -> int:
    """Tokens that the padded model computes."""
    lengths = [len(completion.ids) for completion in encoded]
    lengths = sorted(lengths, reverse=True) if is_sorted else lengths
    return sum(max(lengths[a : a + size]) * len(lengths[a : a + size]) for a in range(0, len(lengths), size))


def our_tokens(model: RewardModel, encoded: Sequence[Completion]) -> int:
    """Tokens that ours computes."""
    return sum(len(pack.input_ids_T) for pack in model.packs(model.groups(encoded), per_token=False))


# -------------------------------------------------------------------------------------------------------- comparison


def same_rewards(
    theirs: LlamaForSequenceClassification, ours: RewardModel, encoded: Sequence[Completion], dtype: torch.dtype
) -> bool:
    """Whether both give the same rewards; prints the largest difference."""
    expected, found = padded_rewards(theirs, encoded, 4, False), our_rewards(ours, encoded)
    error, limit = float(np.abs(found - expected).max() / expected.std()), TOLERANCE[dtype]
    print(f"{dtype}: rewards differ by at most {error:.2g} standard deviations (allowed: {limit:g})", flush=True)
    return error <= limit


def best_batch(
    model: LlamaForSequenceClassification, encoded: Sequence[Completion], is_sorted: bool, device: torch.device
) -> int:
    """The fastest batch size, each run once, stopping at the first that is 20% slower than the best or does not fit."""
    taken: dict[int, float] = {}
    for size in GPU_BATCHES if device.type == "cuda" else BATCHES:
        start = measure.now(device)
        try:
            padded_rewards(model, encoded, size, is_sorted)
        except torch.OutOfMemoryError:
            break
        taken[size] = measure.now(device) - start
        if size >= len(encoded) or taken[size] > 1.2 * min(taken.values()):
            break
    return min(taken, key=lambda size: taken[size])


def race(
    theirs: LlamaForSequenceClassification,
    ours: RewardModel,
    encoded: Sequence[Completion],
    device: torch.device,
    seconds: float,
) -> list[dict[str, Any]]:
    """A row for each contestant."""
    our_rewards(ours, encoded)
    functions: dict[str, Callable[[], object]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, is_sorted in ((PADDED, False), (SORTED, True)):
        size = best_batch(theirs, encoded, is_sorted, device)
        functions[name] = partial(padded_rewards, theirs, encoded, size, is_sorted)
        rows[name] = {"batch": size, "computed": computed_tokens(encoded, size, is_sorted)}
    functions[OURS] = lambda: our_rewards(ours, encoded)
    rows[OURS] = {"computed": our_tokens(ours, encoded)}
    taken = measure.times(functions, device, seconds)
    count, tokens = len(encoded), sum(len(completion.ids) for completion in encoded)
    for name, row in rows.items():
        median, low, high = taken[name]
        row |= {
            "method": name,
            "completions/s": 1000 * count / median,
            "p10": 1000 * count / high,
            "p90": 1000 * count / low,
            "x padded": taken[PADDED][0] / median,
            "x sorted": taken[SORTED][0] / median,
            "tokens/s": 1000 * tokens / median,
            "least work": tokens / row["computed"],
            "computed/completion": row.pop("computed") / count,
            "peak MB": measure.peak_memory(functions[name], device) / 2**20,
            "completions": count,
        }
    return list(rows.values())


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    return "; ".join(
        f"{row['data']}, {row['per prompt']} per prompt: {row['completions/s']:.1f} completions/s, "
        f"{row['x padded']:.1f} times padded, {row['x sorted']:.1f} times padded and sorted"
        for row in rows
        if row["method"] == OURS
    )


def plot(rows: Sequence[dict[str, Any]], path: str, title: str) -> None:
    """Bars of completions/s, grouped by data set and number of completions per prompt."""
    figure, axes = plt.subplots(figsize=(11, 4), layout="constrained")
    groups = list(dict.fromkeys(f"{row['data']}\n{row['per prompt']} per prompt" for row in rows))
    for i, method in enumerate((PADDED, SORTED, OURS)):
        values = [row["completions/s"] for row in rows if row["method"] == method]
        bars = axes.bar([k + 0.27 * (i - 1) for k in range(len(groups))], values, 0.25, label=method)
        axes.bar_label(bars, fmt="%.3g", fontsize=8)
    axes.set(xticks=range(len(groups)), xticklabels=groups, ylabel="completions/s")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="default: 1b on CUDA, else tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--data", nargs="+", choices=records.DATA, default=records.DATA, help="default: both")
    parser.add_argument("--completions", type=int, help="about how many to score; default: 200, 4000 on CUDA")
    parser.add_argument(
        "--tokens-per-batch", type=int, default=16384, help="pack size of ours; default: that of RewardModel"
    )
    parser.add_argument("--seconds", type=float, help="seconds per contestant; default: 20")
    parser.add_argument(
        "--quick", action="store_true", help="48 completions (2000 on CUDA), the minimum number of runs"
    )
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    options.model = options.model or ("1b" if cuda else "tiny")
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    options.completions = options.completions or (
        (2000 if options.quick else 4000) if cuda else (48 if options.quick else 200)
    )
    options.seconds = options.seconds or (0.0 if options.quick else 20.0)
    return options


def main() -> None:
    options = arguments()
    train.keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, dtype = MODELS[options.model], getattr(torch, options.dtype)
    where = measure.environment(device)
    about = {
        "model": options.model,
        "dtype": options.dtype,
        "records": records.source(),
        "tokens per pack": options.tokens_per_batch,
    }
    print(", ".join(f"{k} {v}" for k, v in {**where, **about}.items()), flush=True)
    encoded = {
        (name, each): records.completions(name, max(options.completions // each, 1), each, SEED)
        for name in options.data
        for each in EACH
    }
    for kind in dict.fromkeys((torch.float32, dtype)):
        theirs = padded_model(config, kind, device)
        ours = our_model(config, kind, device, options.tokens_per_batch)
        if not all(same_rewards(theirs, ours, some[:24], kind) for some in encoded.values()):
            print("error: the rewards differ (see above), so nothing is timed", file=sys.stderr)
            sys.exit(1)
    rows = []
    for (name, each), some in encoded.items():
        rows += [{"data": name, "per prompt": each} | row for row in race(theirs, ours, some, device, options.seconds)]
        print(measure.table(rows[-3:], COLUMNS), flush=True)
    stem = measure.record(f"scoring-{options.model}-{options.dtype}", [{**row, **about} for row in rows], where)
    plot(rows, f"{stem}.png", f"{options.model}, {options.dtype}, {where['device']}, {where['date']}")
    print(verdict(rows))
    print(f"written: {stem}.*")


if __name__ == "__main__":
    main()
