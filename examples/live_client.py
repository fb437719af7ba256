"""Drops samples of a policy while they are written: the loop of a vLLM or SGLang user, here with a policy of this
package.

    gcrm serve MODEL --port 8000 &
    python examples/live_client.py POLICY "a=3,b=4,c=0,d=2:b+d+a?" --samples 16 --threshold 0

Each turn asks the policy for the next few tokens of all running samples, and the server which of them to drop; an
engine with a prefix cache computes only what is new. Policy and reward model have the same tokenizer here; with another
one, send text instead of ids. The answer is the finished sample with the greatest reward.
"""

import argparse
import json
import os
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gcrm_fast import Policy

Step = Callable[[Sequence[list[int]], int], list[list[int]]]
"""(texts so far as ids, number of the turn) -> their next tokens; the stop token last where one was reached. With vLLM:

    def step(ids, turn):
        seeds = [10_000 * turn + i for i in range(len(ids))]  # a seed is one request's: equal ones give equal texts
        parameters = [SamplingParams(max_tokens=CHUNK, temperature=1.0, seed=seed) for seed in seeds]
        outputs = llm.generate([{"prompt_token_ids": one} for one in ids], parameters)
        return [list(output.outputs[0].token_ids) for output in outputs]
"""

CHUNK = 8  # tokens of a turn


class Answer(NamedTuple):
    """The ids of the answer and its reward (None, [] if no sample ended), the tokens written, the dropped samples."""

    ids: list[int]
    reward: float | None
    tokens: int
    dropped: list[int]


def ask(url: str, method: str, body: Any = None) -> Any:
    """One request to the server. GCRM_TOKEN is the server's token, if it has one."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('GCRM_TOKEN', '')}"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=60) as answer:
        return json.load(answer)


def filtered(
    url: str,
    step: Step,
    prompt_ids: list[int],
    *,
    samples: int,
    threshold: float,
    stop_ids: Sequence[int],
    max_new_tokens: int,
) -> Answer:
    """Writes samples of one prompt, dropping those whose Q-value falls below the threshold, but never the last."""
    stream = ask(f"{url}/stream", "POST", {"prompt_ids": prompt_ids, "rows": samples, "threshold": threshold})
    written: list[list[int]] = [[] for _ in range(samples)]
    running, dropped = list(stream["rows"]), set[int]()
    rewards: dict[int, float] = {}
    turn = 0
    try:
        while running:
            chunks = []
            new_ids = step([[*prompt_ids, *written[row]] for row in running], turn)
            for row, ids in zip(running, new_ids, strict=True):
                written[row] += ids
                stopped = bool(ids) and ids[-1] in stop_ids
                cut = len(written[row]) >= max_new_tokens
                chunks.append({"row": row, "ids": ids, "end": "stop" if stopped else "length" if cut else None})
            answer = ask(f"{url}/stream/{stream['id']}", "POST", {"chunks": chunks})
            rewards |= {one["row"]: one["reward"] for one in answer["rows"] if written[one["row"]][-1] in stop_ids}
            dropped |= set(answer["drop"])
            running, turn = answer["running"], turn + 1
    finally:
        ask(f"{url}/stream/{stream['id']}", "DELETE")
    whole = {row: reward for row, reward in rewards.items() if row not in dropped}
    best = max(whole, key=whole.__getitem__, default=None)
    tokens = sum(map(len, written))
    if best is None:
        return Answer([], None, tokens, sorted(dropped))
    return Answer(written[best], whole[best], tokens, sorted(dropped))


def main() -> None:
    parser = argparse.ArgumentParser(description="Filters samples of a policy with a running gcrm serve.")
    parser.add_argument("policy", help="folder of the policy")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of gcrm serve")
    parser.add_argument("--samples", type=int, default=16, help="number of samples")
    parser.add_argument("--threshold", type=float, default=0.0, help="Q-value below which a sample is dropped")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="maximum number of tokens of a sample")
    given = parser.parse_args()
    policy = Policy.from_pretrained(given.policy)

    def step(ids: Sequence[list[int]], turn: int) -> list[list[int]]:
        return policy.generate_ids(ids, max_new_tokens=CHUNK, temperature=1.0, seed=turn)

    [prompt_ids] = policy.encode([given.prompt])
    answer = filtered(
        given.url,
        step,
        prompt_ids,
        samples=given.samples,
        threshold=given.threshold,
        stop_ids=sorted(policy.stop_ids),
        max_new_tokens=given.max_new_tokens,
    )
    print(policy.tokenizer.decode(answer.ids, skip_special_tokens=True))
    print(f"reward {answer.reward}, {answer.tokens} tokens written, dropped: {answer.dropped}")


if __name__ == "__main__":
    main()
