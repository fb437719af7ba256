"""Preference pairs of a policy's own samples of arithmetic problems: what reward models usually learn from."""

import json
from collections.abc import Callable
from pathlib import Path

from gcrm_fast import Policy
from gcrm_fast.data.arithmetic import generate, is_correct
from summary import write_aside

PROBLEMS, SAMPLES, PAIRS = 6000, 8, 2  # training problems; samples of each; pairs of each, at most


def own_pairs(
    policy: Policy, path: Path, *, is_right: Callable[[str, str], bool] = is_correct, max_new_tokens: int = 24
) -> Path:
    """A file of pairs of right and wrong samples at temperature 1, of training problems. Written once. ``is_right``
    judges a prompt and a sample."""
    if path.exists():
        return path
    prompts = [*dict.fromkeys(pair.prompt for pair in generate(4 * PROBLEMS, 0, 0, 3)[0])][:PROBLEMS]
    asked = [prompt for prompt in prompts for _ in range(SAMPLES)]
    texts = policy.generate(asked, max_new_tokens=max_new_tokens, temperature=1.0, seed=0, rows=512)
    lines = []
    for i, prompt in enumerate(prompts):
        sampled = [*dict.fromkeys(texts[SAMPLES * i : SAMPLES * (i + 1)])]
        right = [text for text in sampled if is_right(prompt, text)]
        wrong = [text for text in sampled if text.strip() and not is_right(prompt, text)]
        pairs = [{"prompt": prompt, "chosen": a, "rejected": b} for a in right for b in wrong[:PAIRS]]
        lines += [json.dumps(pair) + "\n" for pair in pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, "".join(lines))
    return path
