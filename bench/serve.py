"""Throughput and behavior of ``gcrm serve`` over real HTTP on this machine's loopback.

    python bench/serve.py [--quick] [--model FOLDER]

The baseline asks for one completion at a time, waiting for each answer, from a server that does not wait for others to
share a batch (--delay 0). Then many connections at once, with every answer compared with the reward computed in this
process; then malformed requests between good ones, and clients that hang up. Prints a table, writes
bench/results/serve-*, and ends with exit code 1 if an answer was lost, wrong, or refused, if a malformed request was
answered other than 4xx, or if the server did not survive. Without --model, a small random one: speed does not depend
on the values of weights.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import measure
from gcrm_fast import RewardModel
from gcrm_fast.checkpoints.saving import save_model
from gcrm_fast.data.tokenization import train_tokenizer
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.reward_model import LlamaRewardModel, initial_value

WORDS = ("sum", "of", "two", "numbers", "is", "the", "and", "so", "we", "get", "then", "add", "half", "times", "apples")
QUEUE = 20_000
MALFORMED: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"query": "text"}',
    b'{"query": [1]}',
    b'{"query": [null]}',
    b'{"query": ["\xff"]}',
    b'{"query": ["a"], "prompts": ["a", "b"]}',
    b"[" * 50_000,
    b'{"query": ["\\ud800"]}',
    b'{"query": {"a": 1}}',
    b'{"query": [' + b'"a",' * QUEUE + b'"a"]}',
    b'{"query": ["' + b"word " * 100_000 + b'"]}',
    b"\x00" * 1000,
)


class Measured(NamedTuple):
    seconds: float
    latencies: np.ndarray  # seconds, in the order of the requests; nan where no answer came
    wrong: int  # lost, of another request, or not 200


class Connection:
    """One kept-alive HTTP/1.1 connection: a minimal client, so that the server is what is measured."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, body: bytes) -> None:
        self.writer.write(
            b"POST /get_reward HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )

    async def answer(self) -> tuple[int, bytes]:
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        return int(head[9:12]), await self.reader.readexactly(int(length[1]) if length else 0)


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


@asynccontextmanager
async def served(folder: Path, *options: str) -> AsyncIterator[int]:
    """The port of a running server, which must still run at the end and then stop with exit code 0."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gcrm_fast.cli",
        "serve",
        str(folder),
        "--port",
        "0",
        *options,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        port = int(line.partition(",")[0].rpartition(":")[2])
        for _ in range(200):
            try:
                async with connected(port):
                    break
            except OSError:
                await asyncio.sleep(0.05)
        yield port
        assert process.returncode is None, "the server has ended"
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 60) == 0, f"the server ended with code {process.returncode}"
    finally:
        if process.returncode is None:
            process.kill()


def body_of(prompt: str, completion: str) -> bytes:
    return json.dumps({"query": [prompt + completion], "prompts": [prompt], "labels": [None]}).encode()


async def ask_all(port: int, bodies: Sequence[bytes], expected: np.ndarray, connections: int) -> Measured:
    """Sends every request once over ``connections``; each answer must be the reward of its completion."""
    latencies = np.full(len(bodies), np.nan)
    numbers = iter(range(len(bodies)))
    wrong = 0

    async def client() -> None:
        nonlocal wrong
        async with connected(port) as line:
            for i in numbers:
                start = time.perf_counter()
                line.send(bodies[i])
                status, text = await line.answer()
                latencies[i] = time.perf_counter() - start
                rewards = json.loads(text).get("rewards", [])
                wrong += int(status != 200 or len(rewards) != 1 or abs(rewards[0] - expected[i]) > 1e-3)

    start = time.perf_counter()
    results = await asyncio.gather(*(client() for _ in range(connections)), return_exceptions=True)
    seconds = time.perf_counter() - start
    for error in filter(None, results):
        print(f"a client failed: {error!r}", file=sys.stderr)
    return Measured(seconds, latencies, wrong + int(np.isnan(latencies).sum()))


async def malformed(port: int) -> list[str]:
    """The malformed requests that were answered other than 4xx."""
    bad = []
    for body in MALFORMED:
        async with connected(port) as line:
            line.send(body)
            status, text = await line.answer()
            if not 400 <= status < 500 or "error" not in json.loads(text):
                bad.append(f"malformed {body[:40]!r} was answered {status}")
    return bad


async def hang_up(port: int, bodies: Sequence[bytes], rng: random.Random) -> None:
    """Clients that leave in the middle of a request, right after it, and a little later."""

    async def client(body: bytes) -> None:
        async with connected(port) as line:
            line.send(body)
            if rng.random() < 0.3:
                line.writer.transport.abort()
            await asyncio.sleep(rng.choice([0, 0.001, 0.01]))

    await asyncio.gather(*(client(body) for body in bodies))


def random_model(folder: Path) -> Path:
    """Width 256, six layers: the size at which the training step is also measured."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 50, 400)
    config = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
    )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaRewardModel(config).named_parameters()}
    state = {name: initial_value(name, shape, config, 0) for name, shape in shapes.items()}
    save_model(folder, state, config, tokenizer, torch.ones(config.hidden_size), 1)
    return folder


def requests(count: int, per_prompt: int, rng: random.Random) -> tuple[list[str], list[str]]:
    """Distinct completions of 5 to 40 words, ``per_prompt`` in a row for each prompt of 60 words, as a trainer sends
    them."""
    prompts = [" ".join(rng.choices(WORDS, k=60)) for _ in range(-(-count // per_prompt))]
    completions = [f" {i} " + " ".join(rng.choices(WORDS, k=rng.randint(5, 40))) for i in range(count)]
    return [prompts[i // per_prompt] for i in range(count)], completions


async def run(arguments: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, what went wrong)."""
    rng = random.Random(0)
    prompts, completions = requests(arguments.requests, arguments.per_prompt, rng)
    bodies = [body_of(*pair) for pair in zip(prompts, completions, strict=True)]
    expected = RewardModel.from_pretrained(folder).score(prompts, completions)
    rows: list[dict[str, Any]] = []
    faults: list[str] = []

    def add(what: str, connections: int, measured: Measured) -> float:
        answered = measured.latencies[~np.isnan(measured.latencies)]
        rate = len(answered) / measured.seconds
        p50, p99 = (float(1000 * np.percentile(answered, q)) for q in (50, 99))
        rows.append(
            {
                "what": what,
                "connections": connections,
                "requests": len(measured.latencies),
                "requests/s": rate,
                "p50 ms": p50,
                "p99 ms": p99,
                "wrong": measured.wrong,
            }
        )
        if measured.wrong:
            faults.append(f"{what}: {measured.wrong} answers lost, wrong or refused")
        return rate

    async with served(folder, "--delay", "0") as port:
        await ask_all(port, bodies[:20], expected, 1)  # warm
        single = add("one at a time", 1, await ask_all(port, bodies[: arguments.single], expected, 1))
    async with served(folder, "--queue", str(QUEUE)) as port:
        await ask_all(port, bodies[:50], expected, 10)
        for connections in arguments.connections:
            part = bodies if connections == max(arguments.connections) else bodies[: len(bodies) // 4]
            together = add("together", connections, await ask_all(port, part, expected, connections))
            rows[-1]["times one at a time"] = together / single
        bad = await malformed(port)
        await hang_up(port, bodies[:500], rng)
        add("after malformed requests and hang-ups", 20, await ask_all(port, bodies[:200], expected, 20))
    return rows, faults + bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder of a reward model")
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    parser.add_argument("--requests", type=int, default=0, help="requests of the largest run (10,000)")
    parser.add_argument("--connections", type=int, nargs="+", default=[16, 64, 1000], help="open at a time")
    parser.add_argument("--per-prompt", type=int, default=8, help="completions of each prompt")
    arguments = parser.parse_args()
    arguments.requests = arguments.requests or (1000 if arguments.quick else 10_000)
    arguments.single = min(arguments.requests, 100 if arguments.quick else 500)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.model) if arguments.model else random_model(Path(temporary) / "model")
        rows, faults = asyncio.run(run(arguments, folder))
    print(measure.table(rows, list(dict.fromkeys(key for row in rows for key in row))))
    print(
        *faults or [f"every answer was right; {len(MALFORMED)} malformed requests answered 4xx; alive at the end"],
        sep="\n",
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"-> {measure.record('serve', rows, measure.environment(device))}.json")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
