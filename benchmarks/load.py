"""Does a server stay right while 200 clients stream, hang up and send nonsense?

    python -m benchmarks.load CHECKPOINT --text FILE [--clients 200] [--seconds 600] [--serve-args=ARGUMENTS]

Starts ``vllm serve``, asks it some prompts while it is quiet, then lets many clients stream completions of random
lengths at once: part of them repeat those prompts, part sample, part hang up in mid-stream and part send bad requests.
A completion under load must be that of the quiet server: the log-probabilities of its tokens within ``--bound``, and
the tokens themselves wherever the quiet server's two best were further apart than twice that, for a batch of another
size rounds differently. ``--unquantized`` takes an ordinary checkpoint: how much vLLM itself differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import shlex
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
from transformers import AutoTokenizer

from benchmarks.memory import children_bytes, sampled
from benchmarks.server import vllm_server

MAX_LENGTH = 512
PROBES = 40
# Fewer tokens of KV cache than the clients want at once, so that requests wait and are preempted.
CACHE_TOKENS = 32_768
BLOCK = 128
SERVE = ["--max-model-len", str(MAX_LENGTH), "--num-gpu-blocks-override", str(CACHE_TOKENS // BLOCK)]
# What the clients do, and how often.
SHARES = {"probe": 4, "sample": 3, "abort": 2, "bad": 1}

# Each is refused with a status from 400 to 499. None is sent as it is, not as JSON.
BAD_REQUESTS: list[dict[str, Any] | None] = [
    None,
    {},
    {"prompt": "a", "max_tokens": -1},
    {"prompt": "a", "max_tokens": "many"},
    {"prompt": "a", "temperature": -1},
    {"prompt": "a", "n": 0},
    {"prompt": "a", "top_p": 7},
    {"prompt": "a", "logprobs": 10**6},
    {"prompt": [10**9], "max_tokens": 1},
    {"prompt": [-1], "max_tokens": 1},
    {"prompt": [5] * (MAX_LENGTH + 1), "max_tokens": 1},
    {"prompt": {"text": "a"}},
    {"prompt": "a", "model": "no-such-model"},
    {"prompt": "a", "stream_options": "yes"},
]


@dataclass(frozen=True)
class Step:
    """One token of a completion: its name, its log-probability, and how far the best two tokens were apart."""

    token: str
    logprob: float
    margin: float


@dataclass
class Load:
    """What happened; memory: the seconds and resident bytes of all processes of the server together."""

    seconds: float = 0.0
    requests: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    tokens: int = 0
    compared_tokens: int = 0
    equal_probes: int = 0
    max_logprob_difference: float = 0.0
    max_margin_of_other_token: float = 0.0
    memory: list[tuple[float, int]] = field(default_factory=list)

    def memory_by_tenths(self) -> list[float]:
        """The greatest memory in each tenth of the run, in MiB; a sample holds until the next one."""
        spans = [(start, end, size / 2**20) for (start, size), (end, _) in pairwise([*self.memory, (math.inf, 0)])]
        edges = [self.seconds * i / 10 for i in range(11)]
        return [max(m for start, end, m in spans if start < to and end > since) for since, to in pairwise(edges)]

    def memory_growth(self) -> float:
        """From the fifth tenth of the run to the last, in MiB: what takes its place at the start does not count."""
        tenths = self.memory_by_tenths()
        return tenths[9] - tenths[4]

    def figures(self) -> dict[str, Any]:
        """All of it as JSON, with sums in the place of lists."""
        counted = {"requests": dict(self.requests), "failures": len(self.failures)}
        memory = {"memory": [round(m) for m in self.memory_by_tenths()], "memory_growth": round(self.memory_growth())}
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, **counted, **memory}

    def check(self, bound: float) -> None:
        """Raise ValueError unless every request ended as it should, and every probe as on the quiet server."""
        if self.failures:
            raise ValueError(f"{len(self.failures)} requests failed, the first: {self.failures[0]}")
        if self.max_logprob_difference > bound or self.max_margin_of_other_token > 2 * bound:
            raise ValueError(
                f"expected log-probabilities within {bound} of the quiet server's, got {self.max_logprob_difference}, "
                f"and other tokens at margins up to {self.max_margin_of_other_token}"
            )


class Client:
    """One of many clients of a server."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, model: str) -> None:
        self.session, self.url, self.model = session, f"{base_url}/completions", model

    async def stream(self, prompt: Sequence[int], max_tokens: int, **options: Any) -> AsyncIterator[list[Step]]:
        """The tokens of a completion as they come. Raises RuntimeError for any status but 200, or a cut stream."""
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": max_tokens, "stream": True, "logprobs": 2}
        body |= {"return_tokens_as_token_ids": True, "ignore_eos": True, **options}
        async with self.session.post(self.url, json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {(await response.text())[:300]}")
            async for line in response.content:
                if line.strip() == b"data: [DONE]":
                    return
                if line.startswith(b"data: "):
                    yield _steps(json.loads(line[6:]))
        raise RuntimeError("the stream ended without [DONE]")

    async def complete(self, prompt: Sequence[int], max_tokens: int, **options: Any) -> list[Step]:
        """All tokens of a completion."""
        return [step async for steps in self.stream(prompt, max_tokens, **options) for step in steps]

    async def send_bad(self, body: dict[str, Any] | None) -> None:
        """Send a bad request. Raises RuntimeError unless it is refused as the client's mistake."""
        content = '{"prompt": ' if body is None else json.dumps({"model": self.model, **body})
        headers = {"Content-Type": "application/json"}
        async with self.session.post(self.url, data=content, headers=headers) as response:
            if not 400 <= response.status < 500:
                raise RuntimeError(f"bad request {body!r:.80}: status {response.status}: {await response.text():.200}")


def _steps(chunk: dict[str, Any]) -> list[Step]:
    if "error" in chunk:
        raise RuntimeError(f"error in the stream: {chunk['error']}")
    steps = []
    for choice in chunk["choices"]:
        logprobs = choice["logprobs"]
        for token, logprob, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        ):
            best = sorted(top.values(), reverse=True)
            steps.append(Step(token, logprob, best[0] - best[1]))
    return steps


def compare(load: Load, quiet: Sequence[Step], found: Sequence[Step]) -> None:
    """Compare a completion with that of the quiet server, as far as both are the same text."""
    load.equal_probes += [step.token for step in quiet] == [step.token for step in found]
    for expected, step in zip(quiet, found, strict=True):
        if expected.token != step.token:
            load.max_margin_of_other_token = max(load.max_margin_of_other_token, expected.margin)
            return
        load.compared_tokens += 1
        difference = abs(expected.logprob - step.logprob)
        load.max_logprob_difference = max(load.max_logprob_difference, difference)


async def run(base_url: str, model: str, ids: Sequence[int], clients: int, seconds: float, seed: int) -> Load:
    """Put the server under load for some seconds; ids: a text to take prompts from."""
    load, dice = Load(), random.Random(seed)

    def prompt() -> list[int]:
        length = dice.randint(1, MAX_LENGTH // 2)
        start = dice.randrange(len(ids) - length)
        return list(ids[start : start + length])

    timeout = aiohttp.ClientTimeout(total=600)
    # A connection for each request: the server closes those that are idle, which may be when the next one is sent.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        client = Client(session, base_url, model)
        probes = [(prompt(), dice.randint(1, 64)) for _ in range(PROBES)]
        quiet = [await client.complete(*probe, temperature=0) for probe in probes]
        start = time.monotonic()

        async def act(kind: str) -> None:
            if kind == "probe":
                i = dice.randrange(PROBES)
                found = await client.complete(*probes[i], temperature=0)
                load.tokens += len(found)
                compare(load, quiet[i], found)
            elif kind == "bad":
                await client.send_bad(dice.choice(BAD_REQUESTS))
            else:
                left = dice.randint(0, 20) if kind == "abort" else MAX_LENGTH
                async with aclosing(client.stream(prompt(), dice.randint(1, 200), temperature=1)) as stream:
                    async for steps in stream:
                        load.tokens += len(steps)
                        left -= len(steps)
                        if left <= 0:
                            break

        async def work() -> None:
            while time.monotonic() - start < seconds:
                (kind,) = dice.choices(list(SHARES), list(SHARES.values()))
                load.requests[kind] += 1
                try:
                    await act(kind)
                except (RuntimeError, aiohttp.ClientError, TimeoutError, ValueError) as error:
                    load.failures.append(f"{kind}: {error!r}")

        with sampled(children_bytes, 1) as load.memory:
            await asyncio.gather(*(work() for _ in range(clients)))
        load.seconds = time.monotonic() - start
        # Whatever happened, the server still answers as before.
        compare(load, quiet[0], await client.complete(*probes[0], temperature=0))
    return load


def serve_and_run(
    checkpoint: Path,
    text: str,
    clients: int,
    seconds: float,
    serve_args: Sequence[str],
    log: Path,
    seed: int = 0,
) -> Load:
    """Start a server, put it under load, and stop it; log: the file that takes what the server prints."""
    ids = AutoTokenizer.from_pretrained(checkpoint)(text, add_special_tokens=False)["input_ids"]
    with vllm_server(checkpoint, [*SERVE, *serve_args], log=log) as base_url:
        return asyncio.run(run(base_url, str(checkpoint), ids, clients, seconds, seed))


def main() -> None:
    """Print the figures as one JSON object; the status is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--bound", type=float, default=0.1, help="on differences of log-probabilities (default 0.1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unquantized", action="store_true", help="the checkpoint is an ordinary one")
    parser.add_argument("--serve-args", type=shlex.split, default=[], help="more arguments for vllm serve, one string")
    args = parser.parse_args()
    serve_args = ["--dtype", args.dtype, *([] if args.unquantized else ["--quantization", "alphaq"]), *args.serve_args]
    with tempfile.TemporaryDirectory(prefix="alphaq-load-") as folder:
        log = Path(folder, "server.log")
        load = serve_and_run(
            args.checkpoint, args.text.read_text(), args.clients, args.seconds, serve_args, log, args.seed
        )
    print(json.dumps(load.figures()))
    load.check(args.bound)


if __name__ == "__main__":
    main()
