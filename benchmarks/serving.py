"""How fast does vLLM serve a model in each format, and how much memory is left for its cache?

    python -m benchmarks.serving MODEL --text FILE --formats bf16,alphaq:2.5,alphaq:3.5,gptq=DIR,awq=DIR
        [--concurrency 1,8,32,128] [--input 128] [--output 64] [--serve-args=ARGUMENTS]
    python -m benchmarks.serving MODEL --formats alphaq=OUT --unchecked

One ``vllm serve`` process per format, driven by vLLM's own ``vllm bench serve`` with random prompts; ``alphaq:BITS`` is
converted first, ``alphaq=DIRECTORY`` has been, and another ``NAME=DIRECTORY`` is a checkpoint of MODEL by
llm-compressor (``benchmarks.peer_checkpoint``). One JSON line per format and concurrency goes to
``benchmarks/results/serving.jsonl``.

Figures count only where the server's log-probabilities of the text are those of transformers on the dequantized
weights; otherwise, and where vLLM does not serve the format on this machine, or the answers did not stream token by
token, the line holds the reason (``error``) in the place of figures. ``--unchecked`` leaves the comparison out, for
models that this machine cannot run in full precision, and the line says so. On a CPU vLLM computes on all cores:
otherwise it leaves one to the rest of the server.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.compressed import write_plain
from benchmarks.fidelity import compare, reference_logprobs, served_logprobs, windows
from benchmarks.machine import machine
from benchmarks.memory import children_bytes
from benchmarks.server import CPU_ENVIRONMENT, vllm_server
from offline.allocation.bit_map import average_bits
from offline.source.alphaq import check_alphaq
from offline.source.checkpoint import open_checkpoint

RESULTS = Path(__file__).parent / "results" / "serving.jsonl"
# Of what `vllm bench serve` reports: milliseconds, tokens a second, seconds.
FIGURES = ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "output_throughput", "duration")
CACHE_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
# A server that cannot keep up sends several tokens at once, and the time between them is then no client's.
MIN_STREAMED = 0.95
MIN_REQUESTS = 16
ALL_CORES = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
# Not the hints of vLLM that quote an error.
ERROR_LINE = re.compile(r"(?<!`)\b(\w+Error: .+)")


@dataclass(frozen=True)
class Format:
    """A way to store the model; checkpoint: where it is stored so already."""

    name: str
    bits: str | None = None
    checkpoint: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Format:
        """From ``bf16``, ``alphaq:BITS`` or ``NAME=DIRECTORY``. Raises ValueError for anything else.

        >>> Format.parse("alphaq:3.5")
        Format(name='alphaq', bits='3.5', checkpoint=None)
        """
        if text == "bf16":
            return cls(text)
        if match := re.fullmatch(r"alphaq:(\d+(?:\.\d+)?)", text):
            return cls("alphaq", bits=match[1])
        if match := re.fullmatch(r"(\w+)=(.+)", text):
            checkpoint = Path(match[2])
            return cls(match[1], _average_bits(checkpoint) if match[1] == "alphaq" else None, checkpoint)
        raise ValueError(f"--formats: expected bf16, alphaq:BITS or NAME=DIRECTORY, got {text!r}")


def _average_bits(checkpoint: Path) -> str:
    widths = check_alphaq(open_checkpoint(str(checkpoint)))
    return f"{average_bits({matrix.name: bits for matrix, bits in widths.items()}, list(widths)):.4g}"


@dataclass(frozen=True)
class Load:
    """What clients ask for: tokens of a prompt and of an answer, requests for each client in turn."""

    concurrency: tuple[int, ...]
    input: int
    output: int
    rounds: int


def stored(model: Path, wanted: Format, work: Path) -> Path:
    """The checkpoint to serve."""
    if wanted.name == "bf16":
        return model
    if wanted.checkpoint:
        return wanted.checkpoint
    _run("offline.convert", str(model), str(work / "alphaq"), "--bits", str(wanted.bits))
    return work / "alphaq"


def plain(model: Path, wanted: Format, checkpoint: Path, work: Path) -> Path:
    """An ordinary checkpoint of the same values, for transformers."""
    if wanted.name == "bf16":
        return model
    out = work / "plain"
    if wanted.name == "alphaq":
        _run("offline.dequantize", str(checkpoint), str(out))
    else:
        write_plain(checkpoint, out, open_checkpoint(str(model)))
    return out


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", *arguments], check=True, stdout=subprocess.DEVNULL)


def measure(
    model: Path, wanted: Format, load: Load, text: str | None, bound: float, serve_args: list[str], work: Path
) -> Iterator[dict[str, Any]]:
    """One row for each concurrency, or one with an error; text: None to compare nothing."""
    checkpoint = stored(model, wanted, work)
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    if text is not None:
        ordinary = plain(model, wanted, checkpoint, work)
        prompts = windows(ordinary, text, 2048)
        expected = reference_logprobs(ordinary, prompts, torch.bfloat16)
    arguments = ["--dtype", "bfloat16", "--max-model-len", "1024", "--no-enable-prefix-caching", *serve_args]
    arguments += ["--quantization", "alphaq"] if wanted.name == "alphaq" else []
    log, start = work / "server.log", time.monotonic()
    try:
        with vllm_server(checkpoint, arguments, log=log, environment=ALL_CORES) as base_url:
            common = {"checkpoint_bytes": size, "load_seconds": time.monotonic() - start, **_memory(log)}
            difference = None
            if text is not None:
                difference = compare(served_logprobs(base_url, prompts), expected).mean_abs_difference
                # Not "greater than": nan must not pass.
                if not difference <= bound:
                    yield {**common, "error": f"log-probabilities off by {difference:.3f} on average"}
                    return
            common |= {"logprob_difference": difference}
            for concurrency in load.concurrency:
                yield {**common, "concurrency": concurrency, **_bench(base_url, checkpoint, load, concurrency, work)}
    except RuntimeError:
        if not (match := ERROR_LINE.search(log.read_text(errors="replace"))):
            raise
        yield {"checkpoint_bytes": size, "error": match[1]}


def _memory(log: Path) -> dict[str, Any]:
    """Tokens of cache by the server's own log; bytes of a CPU's cache, and resident bytes of the server.

    On a GPU the cache takes what the weights leave of ``--gpu-memory-utilization``; on a CPU it has a size of its own.
    """
    cache = CACHE_TOKENS.search(log.read_text(errors="replace"))
    space = None if torch.cuda.is_available() else CPU_ENVIRONMENT["VLLM_CPU_KVCACHE_SPACE"]
    return {
        "cache_tokens": int(cache[1].replace(",", "")) if cache else None,
        "cpu_cache_gib": space and int(space),
        "resident_bytes": children_bytes(),
    }


def _bench(base_url: str, checkpoint: Path, load: Load, concurrency: int, work: Path) -> dict[str, Any]:
    """Figures of one run of ``vllm bench serve``. Raises SystemExit if it, or any request, fails."""
    requests = max(MIN_REQUESTS, concurrency * load.rounds)
    command = [str(Path(sys.executable).with_name("vllm")), "bench", "serve", "--disable-tqdm", "--seed", "0"]
    command += ["--base-url", base_url.removesuffix("/v1"), "--model", str(checkpoint), "--dataset-name", "random"]
    command += ["--random-input-len", str(load.input), "--random-output-len", str(load.output), "--ignore-eos"]
    command += [
        "--num-prompts",
        str(requests),
        "--max-concurrency",
        str(concurrency),
        "--num-warmups",
        str(concurrency),
    ]
    command += ["--percentile-metrics", "ttft,tpot", "--save-result", "--save-detailed"]
    command += ["--result-dir", str(work), "--result-filename", "bench.json"]
    log = work / "bench.log"
    with log.open("wb") as output:
        status = subprocess.run(command, stdout=output, stderr=output, env={**os.environ}, check=False).returncode
    if status:
        raise SystemExit(f"error: vllm bench serve ended with status {status}:\n{log.read_text()[-2000:]}")
    result = json.loads((work / "bench.json").read_text())
    if result["completed"] != requests:
        raise SystemExit(f"error: expected {requests} completed requests, got {result['completed']}")
    streamed = sum(map(len, result["itls"])) / (requests * (load.output - 1))
    if streamed < MIN_STREAMED:
        return {"requests": requests, "error": f"only {streamed:.0%} of the tokens arrived one by one"}
    return {"requests": requests, **{name: result[name] for name in FIGURES}}


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    check = parser.add_mutually_exclusive_group(required=True)
    check.add_argument("--text", type=Path, metavar="FILE", help="for the check of log-probabilities")
    check.add_argument("--unchecked", action="store_true", help="compare no log-probabilities")
    parser.add_argument("--formats", default="bf16,alphaq:3.5", help="default: %(default)s")
    parser.add_argument("--concurrency", default="1,8,32,128", help="clients at once (default %(default)s)")
    parser.add_argument("--input", type=int, default=128, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer (default %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=4, help="requests for each client, at least 16 in all (default %(default)s)"
    )
    parser.add_argument("--bound", type=float, default=0.05, help="on the mean difference of log-probabilities, nats")
    parser.add_argument("--serve-args", type=shlex.split, default=[], help="more arguments for vllm serve, one string")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="where lines are appended")
    return parser


def main() -> None:
    """The command."""
    parser = build_parser()
    args = parser.parse_args()
    try:
        formats = [Format.parse(text) for text in args.formats.split(",")]
    except ValueError as error:
        parser.error(str(error))
    load = Load(tuple(map(int, args.concurrency.split(","))), args.input, args.output, args.rounds)
    settings = {"model": args.model.name, "input": args.input, "output": args.output, "serve_args": args.serve_args}
    text = None if args.unchecked else args.text.read_text()
    for wanted in formats:
        with tempfile.TemporaryDirectory(prefix="alphaq-serving-") as work:
            for figures in measure(args.model, wanted, load, text, args.bound, args.serve_args, Path(work)):
                row = {**settings, "format": wanted.name, "bits": wanted.bits and float(wanted.bits), **figures}
                row |= {**machine(), "vllm": version("vllm")}
                with args.results.open("a") as file:
                    print(json.dumps(row), file=file)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
