"""Clients of a server under test for minutes: mixed, slow, vanishing, malformed and silent ones."""

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import numpy as np

from gcrm_fast import RewardModel

MALFORMED = (b"{", b'{"prompts": 1}', b"[" * 5000, b'{"query": ["a"], "prompts": []} x', b"\xff" * 100)
WORDS = ("hello", "world", "yes.", "no", "naïve", "漢字", "1", "2", "3")


class Soak:
    """Runs the clients for ``seconds``; ``counts`` has their answers by kind, ``wrong`` what should not have come."""

    def __init__(self, port: int, model: RewardModel, seconds: float) -> None:
        self.port, self.end = port, time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        draw = random.Random(0)
        self.prompts = [" ".join(draw.choices(WORDS, k=draw.randint(0, 12))) for _ in range(200)]
        self.completions = [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(200)]
        self.rewards = model.score(self.prompts, self.completions)

    async def run(self) -> None:
        clients = [self._mixed] * 6 + [self._slow] * 3 + [self._vanishing] * 3 + [self._malformed] + [self._silent] * 20
        await asyncio.gather(*(self._repeat(client, i) for i, client in enumerate(clients)))

    async def _repeat(self, client: Callable[[random.Random], Awaitable[None]], seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self.end:
            try:
                await client(draw)
            except Exception as error:
                self.wrong.append(f"{client.__name__}: {error!r}")

    def _request(self, draw: random.Random) -> tuple[bytes, Callable[[bytes], np.ndarray], np.ndarray]:
        """(request, the rewards in its answer, those expected)."""
        which = [draw.randrange(len(self.prompts)) for _ in range(draw.choice([1, 1, 1, 4, 30]))]
        prompts, completions = [self.prompts[i] for i in which], [self.completions[i] for i in which]
        whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        path, body = draw.choice(
            [
                ("/score", {"prompts": prompts, "completions": completions}),
                ("/get_reward", {"query": whole, "prompts": prompts}),
                ("/classify", {"input": whole}),
            ]
        )

        def rewards(answer: bytes) -> np.ndarray:
            read = json.loads(answer)
            return np.array(read["rewards"] if "rewards" in read else [one["probs"][0] for one in read["data"]])

        return request(path, json.dumps(body).encode()), rewards, self.rewards[which]

    async def _mixed(self, draw: random.Random) -> None:
        """Requests on one connection, one after another."""
        async with connected(self.port) as (reader, writer):
            for _ in range(draw.randint(1, 20)):
                raw, rewards, expected = self._request(draw)
                writer.write(raw)
                self._check("mixed", *await answer(reader), rewards, expected)

    async def _slow(self, draw: random.Random) -> None:
        """Sends its request in pieces, sometimes half closes, and reads its answer in pieces."""
        async with connected(self.port) as (reader, writer):
            raw, rewards, expected = self._request(draw)
            for i in range(0, len(raw), 1 + len(raw) // 20):
                writer.write(raw[i : i + 1 + len(raw) // 20])
                await asyncio.sleep(draw.uniform(0, 0.1))
            if draw.random() < 0.5:
                writer.write_eof()
            self._check("slow", *await answer(reader, pause=0.01), rewards, expected)

    async def _vanishing(self, draw: random.Random) -> None:
        """Leaves in the middle of its request, or before its answer."""
        async with connected(self.port) as (_, writer):
            raw, _, _ = self._request(draw)
            writer.write(raw[: draw.randrange(1, len(raw) + 1)] if draw.random() < 0.5 else raw)
            await asyncio.sleep(draw.choice([0, 0.001, 0.01, 0.1]))
            if draw.random() < 0.5:
                writer.transport.abort()
            self.counts["vanished"] += 1

    async def _malformed(self, draw: random.Random) -> None:
        async with connected(self.port) as (reader, writer):
            writer.write(request(draw.choice(["/score", "/get_reward", "/pooling"]), draw.choice(MALFORMED)))
            status, text = await answer(reader)
            if status != 422 or list(json.loads(text)) != ["error"]:
                self.wrong.append(f"malformed: {status} {text[:200]!r}")
            self.counts["malformed"] += 1
            await asyncio.sleep(0.01)

    async def _silent(self, draw: random.Random) -> None:
        """Starts a request line and waits until the server closes the connection."""
        async with connected(self.port) as (reader, writer):
            writer.write(b"POST /score HTTP/1.1\r\nX: "[: draw.randrange(25)])
            left = self.end - time.monotonic()
            with contextlib.suppress(TimeoutError):
                text = await asyncio.wait_for(reader.read(), max(0.0, left))
                if not text.startswith(b"HTTP/1.1 408"):
                    self.wrong.append(f"silent: {text[:200]!r}")
                self.counts["silent"] += 1

    def _check(
        self, kind: str, status: int, text: bytes, rewards: Callable[[bytes], np.ndarray], expected: np.ndarray
    ) -> None:
        self.counts[kind] += 1
        if status != 200 or not np.allclose(rewards(text), expected, rtol=1e-4, atol=1e-4):
            self.wrong.append(f"{kind}: {status} {text[:200]!r}")


def request(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def answer(reader: asyncio.StreamReader, *, pause: float = 0.0) -> tuple[int, bytes]:
    """Status and body of the final answer, the body read in pieces with ``pause`` seconds in between."""
    head = b"HTTP/1.1 100 "
    while head.startswith(b"HTTP/1.1 100 "):
        head = await reader.readuntil(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    left, body = int(fields[b"content-length"]), b""
    while left:
        body += (piece := await reader.read(min(left, 4096)))
        left -= len(piece)
        assert piece, "the connection ended in the middle of an answer"
        await asyncio.sleep(pause)
    return int(head.split(b" ", 2)[1]), body


def resident_bytes(pid: int) -> int:
    """Memory of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return 1024 * int(fields["VmRSS"].split()[0])
