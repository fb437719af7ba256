"""Writing text: ours against transformers' generate, in one process.

    python bench/generate.py [--policy tiny|135m|1b|8b|FOLDER] [--dtype float32|bfloat16] [--quick]

transformers    generate with its cache, left-padded, at the batch size that is fastest here
ours            Policy: each prompt once, attention on the cache itself, a finished text leaves the batch at once

Two cases: 16 samples of one prompt of 300 tokens, 128 new tokens each; 16 prompts of 50 to 300 tokens that stop after
20 to 200. Greedy, the same weights and dtype; in float32 the tokens are compared first, and if they differ, nothing is
timed. Prefill is the time to the first token of every text, decode the rest. Contestants take turns; tokens/s counts
new tokens, and is that of the median time, with its 10th and 90th percentile.

Then the first case again with a reward model of the same size: without it; with rewards at the end alone; with live
Q-values; with a live filter that drops about half of the samples. And 8 prompts of 16 samples with half as many tokens,
32 samples at a time: those that wait take the place of dropped ones. "reward model s" is one forward of all texts of
the first.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

import measure
from gcrm_fast import Policy, RewardModel, train
from gcrm_fast.data.encoding import CUT, Completion
from gcrm_fast.data.ends import End
from gcrm_fast.data.tokenization import choose_pad, train_tokenizer
from gcrm_fast.inference.decoding import Result, decode
from gcrm_fast.inference.generation import Ending, Row, Sampling, Writer
from gcrm_fast.inference.methods import Method, lowest
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.reward_model import LlamaRewardModel, initial_value
from our_step import MODELS

THEIRS, OURS = "transformers", "ours"
BATCHES = (16, 8, 4, 1)  # transformers takes the fastest
COLUMNS = ("case", "method", "batch", "new tokens", "tokens/s", "p10", "p90", "x", "prefill s", "decode tokens/s")
LIVE_COLUMNS = ("method", "seconds", "p10", "p90", "policy tokens", "reward tokens", "saved tokens", "reward model s")
SEED = 0
ROWS, WAITING = 32, 8  # samples written at a time; prompts of 16 samples that wait for room

Case = list[tuple[list[int], int]]  # prompts, and how many new tokens each gets
Run = Callable[[Method, RewardModel | None], list[Result]]


# --------------------------------------------------------------------------------------------------------- contestants


class Limits(StoppingCriteria):
    """Stops each text after its own number of tokens."""

    def __init__(self, limits: Sequence[int], start: int) -> None:
        self.limits, self.start = torch.tensor(limits), start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] - self.start >= self.limits.to(input_ids.device)


@torch.inference_mode()
def their_ids(model: Any, case: Case, size: int, pad: int) -> list[list[int]]:
    new_ids: list[list[int]] = []
    for a in range(0, len(case), size):
        part = case[a : a + size]
        longest, limits = max(len(ids) for ids, _ in part), [limit for _, limit in part]
        padded = torch.tensor([[pad] * (longest - len(ids)) + ids for ids, _ in part], device=model.device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in part], device=model.device)
        whole = model.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=max(limits),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([Limits(limits, longest)]),
        )
        new_ids += [row[longest:][:limit].tolist() for row, limit in zip(whole, limits, strict=True)]
    return new_ids


class LimitedWriter(Writer):
    """Ends each prompt's rows after its own number of tokens, and nowhere else."""

    def __init__(self, policy: Policy, limits: dict[str, int]) -> None:
        super().__init__(policy, Sampling(max_new_tokens=max(limits.values())), rows=16)
        self.limits = limits

    def _append(self, row: Row, token: int, log_p: float) -> None:
        row.ids.append(token)
        ending: Ending = "length"
        if len(row.ids) == self.limits[row.group.name]:
            self.end(row, ending)


def our_ids(policy: Policy, case: Case) -> list[list[int]]:
    writer = LimitedWriter(policy, {str(i): limit for i, (_, limit) in enumerate(case)})
    distinct = list(dict.fromkeys((tuple(ids), limit) for ids, limit in case))
    count = {one: sum((tuple(ids), limit) == one for ids, limit in case) for one in distinct}
    first = {one: next(i for i, (ids, limit) in enumerate(case) if (tuple(ids), limit) == one) for one in distinct}
    groups = {one: writer.add(list(one[0]), count[one], str(first[one])) for one in distinct}
    while writer.step():
        pass
    rows = {one: iter(group.rows) for one, group in groups.items()}
    return [next(rows[tuple(ids), limit]).ids for ids, limit in case]


def random_folder(config: ModelConfig, folder: Path) -> None:
    """A policy of that shape with random weights."""
    tokenizer = train_tokenizer(["text"], 259)
    raw = asdict(config) | {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    torch.manual_seed(SEED)
    LlamaForCausalLM(LlamaConfig(**raw, initializer_range=0.1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def reward_model(policy: Policy) -> RewardModel:
    """One with the policy's trunk, and a random head and goal."""
    config = policy.config
    with torch.device("meta"):
        network = LlamaRewardModel(config)
    network.model = policy.network.model
    assert isinstance(network.score, torch.nn.Linear)
    head = initial_value("score.weight", network.score.weight.shape, config, SEED)
    network.score.weight = torch.nn.Parameter(head.to(policy.device), requires_grad=False)
    goal = torch.randn(config.hidden_size, generator=torch.Generator().manual_seed(SEED))
    goals = {"default": goal}
    return RewardModel(network.eval(), policy.tokenizer, policy.device, "", goals, policy.tokens_per_batch, End())


# --------------------------------------------------------------------------------------------------------------- races


def cases(vocabulary: int, quick: bool) -> dict[str, Case]:
    rng = np.random.default_rng(SEED)

    def ids(count: int) -> list[int]:
        return rng.integers(3, min(vocabulary, 250), size=count).tolist()

    shrink = 8 if quick else 1
    one = ids(300 // shrink)
    several = [(ids(int(rng.integers(50, 301)) // shrink), int(rng.integers(20, 201)) // shrink) for _ in range(16)]
    return {"16 samples": [(one, 128 // shrink)] * 16, "16 prompts": several}


def first_tokens(case: Case) -> Case:
    return [(ids, 1) for ids, _ in case]


def best_batch(function: Callable[[int], object], device: torch.device) -> int:
    """The fastest size, from the largest down until one is slower."""
    function(BATCHES[0])  # warm
    best, taken = 0, float("inf")
    for size in BATCHES:
        start = measure.now(device)
        function(size)
        seconds = measure.now(device) - start
        if seconds > taken:
            break
        best, taken = size, seconds
    return best


def race(model: Any, policy: Policy, name: str, case: Case, seconds: float) -> list[dict[str, Any]]:
    """A row for each contestant."""
    pad, device = choose_pad(policy.tokenizer, policy.config.vocab_size, "the policy"), policy.device
    size = best_batch(lambda size: their_ids(model, case, size, pad), device)
    whole = {THEIRS: partial(their_ids, model, case, size, pad), OURS: partial(our_ids, policy, case)}
    start = {
        THEIRS: partial(their_ids, model, first_tokens(case), size, pad),
        OURS: partial(our_ids, policy, first_tokens(case)),
    }
    taken, prefill = measure.times(whole, device, seconds), measure.times(start, device, seconds / 4)
    tokens = sum(limit for _, limit in case)
    return [
        {
            "case": name,
            "method": method,
            "batch": size if method == THEIRS else 16,
            "new tokens": tokens,
            "tokens/s": 1000 * tokens / taken[method][0],
            "p10": 1000 * tokens / taken[method][2],
            "p90": 1000 * tokens / taken[method][1],
            "x": taken[THEIRS][0] / taken[method][0],
            "prefill s": prefill[method][0] / 1000,
            "decode tokens/s": 1000 * (tokens - len(case)) / max(taken[method][0] - prefill[method][0], 1e-9),
        }
        for method in (THEIRS, OURS)
    ]


def written(
    policy: Policy, prompts: Sequence[str], limit: int, method: Method, model: RewardModel | None
) -> list[Result]:
    """Sampled texts of the prompts, ROWS at a time."""
    sampling = Sampling(max_new_tokens=limit, temperature=1.0, seed=SEED)
    found = decode(policy, prompts, reward=model, method=method, sampling=sampling, rows=ROWS)
    return [one for one in found if isinstance(one, Result)]


def judged(run: Run, unfiltered: Sequence[Result], reward: RewardModel) -> dict[str, Callable[[], list[Result]]]:
    """With live Q-values, as ``unfiltered`` was, and with a filter at the median of what the samples' fall to."""
    fallen = [lowest(text.q_n) for result in unfiltered for text in result.texts]
    dropping = Method(kind="filter", every=16, threshold=float(np.median(fallen)))
    return {"live Q every 16 tokens": partial(run, Method(), reward), "live filter": partial(run, dropping, reward)}


def live(policy: Policy, everything: dict[str, Case], seconds: float) -> list[dict[str, Any]]:
    """What live Q-values cost, and what a filter saves: with one prompt, and with several that wait for room."""
    reward, (ids, limit) = reward_model(policy), everything["16 samples"][0]
    one, *several = (str(policy.tokenizer.decode(own)) for own in (ids, *(p for p, _ in everything["16 prompts"])))
    several = several[:WAITING]
    alone, queue = partial(written, policy, [one], limit), partial(written, policy, several, limit // 2)
    [unfiltered] = alone(Method(), reward)
    waiting = judged(queue, queue(Method(), reward), reward)
    functions: dict[str, Callable[[], list[Result]]] = {
        "no reward model": partial(alone, Method(kind="sample"), None),
        "rewards at the end": partial(alone, Method(every=0), reward),
        **judged(alone, [unfiltered], reward),
        **{f"{WAITING} prompts, {name}": function for name, function in waiting.items()},
    }
    start = policy.encode([one])[0]
    scored = [Completion(np.array([*start, *text.ids], dtype=np.int32), len(start), CUT) for text in unfiltered.texts]
    taken = measure.times({**functions, "forward": lambda: reward.judge(scored)}, policy.device, seconds)
    rows = []
    for name, function in functions.items():
        results, (median, low, high) = function(), taken[name]
        row = {"method": name, "seconds": median / 1000, "p10": low / 1000, "p90": high / 1000}
        costs = {
            "policy tokens": sum(result.policy_tokens for result in results),
            "reward tokens": sum(result.reward_tokens for result in results),
            "saved tokens": sum(result.saved_tokens for result in results),
        }
        rows.append(row | costs | {"reward model s": taken["forward"][0] / 1000})
    return rows


def same_tokens(model: Any, policy: Policy, case: Case) -> bool:
    pad = choose_pad(policy.tokenizer, policy.config.vocab_size, "the policy")
    return their_ids(model, case, len(case), pad) == our_ids(policy, case)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="tiny", help=f"{', '.join(MODELS)} (random weights) or a folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds per contestant; default: 20")
    parser.add_argument("--quick", action="store_true", help="an eighth of all lengths, the minimum number of runs")
    options = parser.parse_args()
    options.seconds = 0.0 if options.quick else options.seconds
    return options


def main() -> None:
    options = arguments()
    train.keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where, dtype = measure.environment(device), getattr(torch, options.dtype)
    about = {"policy": Path(options.policy).name, "dtype": options.dtype}
    print(", ".join(f"{k} {v}" for k, v in {**where, **about}.items()), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.policy)
        if options.policy in MODELS:
            folder = Path(temporary) / "policy"
            random_folder(MODELS[options.policy], folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model = model.to(device).eval()
        policy = Policy.from_pretrained(folder, device=device, dtype=dtype)
    rows: list[dict[str, Any]] = []
    everything = cases(policy.config.vocab_size, options.quick)
    for name, case in everything.items():
        if dtype == torch.float32 and not same_tokens(model, policy, case):
            print(f"error: {name}: the tokens differ, so nothing is timed", file=sys.stderr)
            sys.exit(1)
    for name, case in everything.items():
        rows += race(model, policy, name, case, options.seconds)
        print(measure.table(rows[-2:], COLUMNS), flush=True)
    costs = live(policy, everything, options.seconds)
    print(measure.table(costs, LIVE_COLUMNS), flush=True)
    name = f"generate-{about['policy']}-{options.dtype}"
    stem = measure.record(name, [{**row, **about} for row in (*rows, *costs)], where)
    print(f"written: {stem}.*")


if __name__ == "__main__":
    main()
