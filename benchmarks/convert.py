"""How fast and in how much memory a checkpoint is converted.

    python -m benchmarks.convert [--shape qwen1.5-moe-a2.7b] [--layers 1,2] [--workers N] [-- ARGUMENT ...]
    python -m benchmarks.convert --model MODEL --calibration FILE --out DIR [--tools alphaq,gptq] [--llama PYTHON]

The first generates checkpoints of the true layer shapes of a known model (``benchmarks.generate``) and converts each
with ``python -m offline.convert``, by default or with the arguments that are given. A line has the seconds of each
phase, and what was expected of it before the work began; and the time of alpha beside that of a loop of ``svdvals``.
The second makes checkpoints of MODEL in DIR with AlphaQ (by default and from the weights alone), with GPTQ and AWQ by
llm-compressor (``benchmarks.peer_checkpoint``), and, if ``--tools`` names it, with ``llama.cpp``
(``benchmarks.llama_cpp``), each by a user's command, start of Python included.
One JSON line per checkpoint is printed and appended to ``benchmarks/results/convert.jsonl``.

Memory is the greatest resident size of the process and its children together, sampled up to ten times a second: once
with pages that they share counted once (``peak_bytes``), once counted in each (``peak_bytes_unshared``). What others do
on the machine lengthens ``seconds`` but not ``cpu_seconds``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from alphaq_vllm.cores import available_cores
from benchmarks.generate import MODELS, generate
from benchmarks.machine import machine
from offline.sensitivity.spectra import hill_alpha
from offline.threads import one_thread

RESULTS = Path(__file__).parent / "results" / "convert.jsonl"
# What a model is converted with, unless told otherwise.
TOOLS = "alphaq,alphaq-weights-alone,gptq,awq"
# Of the matrices that alpha is timed on.
HIDDEN, INTERMEDIATE, BLOCK_SIZE = 2048, 1408, 128
SECONDS_BETWEEN_SAMPLES = 0.1
# Of its time, what sampling takes at most: the system looks at every page.
SAMPLING_SHARE = 0.02
# Of the column scales of the matrices that alpha is timed on: alphas of about 6.4 (Gaussian), 3.4, 2.8 and 2.2.
SPREADS = (0.0, 0.4, 0.6, 0.8)


def _heavy_tailed(rows: int, columns: int, generator: torch.Generator, spread: float) -> torch.Tensor:
    """Gaussian weights whose columns differ in scale: with alphas as after training."""
    scale = (torch.randn(columns, generator=generator) * spread).exp() * 0.02
    return (torch.randn(rows, columns, generator=generator) * scale).bfloat16()


def convert(source: Path, out: Path, workers: int, arguments: list[str]) -> dict[str, Any]:
    """Convert with arguments of the command; see ``watch``, and ``Summary`` for phases and expected."""
    command = [sys.executable, "-m", "offline.convert", str(source), str(out), "--workers", str(workers), "--json"]
    output, figures = watch([*command, *arguments])
    summary = json.loads(output)
    return {"arguments": shlex.join(arguments), **figures, "phases": summary["phases"], "expected": summary["expected"]}


def compare(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for each tool's checkpoint of the model, which stays in ``args.out``."""
    ours = [sys.executable, "-m", "offline.convert", str(args.model), "--bits", "3.5"]
    theirs = [args.peers, "-m", "benchmarks.peer_checkpoint", str(args.model), "--calibration", str(args.calibration)]
    theirs += ["--samples", str(args.samples), "--context", str(args.context)]
    commands = {
        "alphaq": ours,
        "alphaq-weights-alone": [*ours, "--noise", "measured", "--quantizer", "mse"],
        **{name: [*theirs, "--method", name] for name in ("gptq", "awq")},
        "llama.cpp": [args.llama, "-m", "benchmarks.llama_cpp", "--type", "Q3_K_M", str(args.model)],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for tool in args.tools.split(","):
        written = args.out / tool
        _, figures = watch([*commands[tool], str(written)])
        made_by = written / "made_by.json"
        yield {
            "model": args.model.name,
            "tool": tool,
            "source_bytes": _tensor_bytes(args.model),
            "checkpoint_bytes": _tensor_bytes(written),
            **figures,
            "made_by": json.loads(made_by.read_text()) if made_by.exists() else None,
            **machine(),
        }


def _tensor_bytes(checkpoint: Path) -> int:
    files = checkpoint.glob("*.safetensors") if checkpoint.is_dir() else [checkpoint]
    return sum(file.stat().st_size for file in files)


def watch(command: list[str]) -> tuple[bytes, dict[str, float]]:
    """Run a command, and return its output, and seconds, CPU seconds and peak bytes. Raises SystemExit if it fails."""
    start = time.monotonic()
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    peak = peak_unshared = 0
    ticks: dict[str, int] = {}
    with ThreadPoolExecutor(2) as readers:
        output, errors = readers.submit(process.stdout.read), readers.submit(process.stderr.read)
        while process.poll() is None:
            began = time.process_time()
            shared, unshared = _sample(process.pid, ticks)
            peak, peak_unshared = max(peak, shared), max(peak_unshared, unshared)
            time.sleep(max(SECONDS_BETWEEN_SAMPLES, (time.process_time() - began) / SAMPLING_SHARE))
    if process.returncode:
        message = errors.result().decode(errors="replace")[-2000:]
        raise SystemExit(f"error: {' '.join(command)} ended with exit status {process.returncode}:\n{message}")
    return output.result(), {
        "seconds": time.monotonic() - start,
        "cpu_seconds": sum(ticks.values()) / os.sysconf("SC_CLK_TCK"),
        "peak_bytes": peak,
        "peak_bytes_unshared": peak_unshared,
    }


def _sample(session: int, ticks: dict[str, int]) -> tuple[int, int]:
    """Resident bytes of all processes of a session with shared pages counted once, and in each; notes CPU ticks."""
    once = in_each = 0
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            # What follows the name, which may hold anything: state, parent, group, session, ...
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) != session:
                continue
            ticks[directory.name] = int(fields[11]) + int(fields[12])
            rollup = dict(line.split(":") for line in (directory / "smaps_rollup").read_text().splitlines()[1:])
        except (OSError, ValueError):
            # It has ended in the meantime.
            continue
        once += 1024 * int(rollup["Pss"].split()[0])
        in_each += 1024 * int(rollup["Rss"].split()[0])
    return once, in_each


@one_thread()
def alpha_speedup(spread: float) -> dict[str, float]:
    """CPU nanoseconds per weight of measuring alpha, of a loop of ``svdvals`` over the same blocks, and their ratio."""
    weight = _heavy_tailed(INTERMEDIATE, HIDDEN, torch.Generator().manual_seed(0), spread).float()
    rows, columns = (side // BLOCK_SIZE * BLOCK_SIZE for side in weight.shape)
    blocks = weight[:rows, :columns].unfold(0, BLOCK_SIZE, BLOCK_SIZE).unfold(1, BLOCK_SIZE, BLOCK_SIZE)
    blocks = blocks.reshape(-1, BLOCK_SIZE, BLOCK_SIZE)
    ours = _best_time(lambda: hill_alpha(weight, BLOCK_SIZE)) / weight.numel()
    theirs = _best_time(lambda: [torch.linalg.svdvals(block) for block in blocks]) / weight.numel()
    return {
        "alpha": hill_alpha(weight, BLOCK_SIZE),
        "alpha_ns": ours * 1e9,
        "svdvals_ns": theirs * 1e9,
        "speedup": theirs / ours,
    }


def _best_time(function: Any) -> float:
    """Least CPU seconds of five calls after a first."""
    function()
    times = []
    for _ in range(5):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", help="of the conversion, after --")
    parser.add_argument("--shape", choices=MODELS, default="qwen1.5-moe-a2.7b", help="model (default %(default)s)")
    parser.add_argument("--layers", default="1,2", help="numbers of layers (default 1,2)")
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes (default: one per core)")
    parser.add_argument("--directory", type=Path, help="for the checkpoints, which are removed (default: temporary)")
    parser.add_argument("--model", type=Path, help="a checkpoint that all tools convert")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="UTF-8 text for the tools that need one")
    parser.add_argument("--samples", type=int, default=256, help="windows of it for them (default 256)")
    parser.add_argument("--context", type=int, default=512, help="tokens in a window (default 512)")
    parser.add_argument("--peers", default=".venv-peers/bin/python", help="a Python with llm-compressor (%(default)s)")
    parser.add_argument("--llama", default="python", help="a Python with llama-cpp-python and gguf (%(default)s)")
    parser.add_argument("--tools", default=TOOLS, help="which tools, in order (default %(default)s; also llama.cpp)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the checkpoints go")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="where lines are appended")
    return parser


def main() -> None:
    """The command."""
    parser = build_parser()
    args = parser.parse_args()
    if args.model:
        if not (args.calibration and args.out):
            parser.error("--model: expected --calibration FILE and --out DIR beside it")
        if unknown := set(args.tools.split(",")) - {*TOOLS.split(","), "llama.cpp"}:
            parser.error(f"--tools: expected some of {TOOLS},llama.cpp, got {', '.join(sorted(unknown))}")
        for line in compare(args):
            _record(line, args.results)
        return
    speedups = [alpha_speedup(spread) for spread in SPREADS]
    for num_layers in map(int, args.layers.split(",")):
        with tempfile.TemporaryDirectory(dir=args.directory) as directory:
            source = Path(directory) / "source"
            generate(args.shape, source, num_layers)
            figures = convert(source, Path(directory) / "out", args.workers, args.arguments)
            size = _tensor_bytes(source)
        line = {
            "shape": args.shape,
            "layers": num_layers,
            "workers": args.workers,
            "source_bytes": size,
            **figures,
            "alpha_speedups": speedups,
            **machine(),
        }
        _record(line, args.results)


def _record(line: dict[str, Any], results: Path) -> None:
    print(json.dumps(line), flush=True)
    with results.open("a") as file:
        print(json.dumps(line), file=file)


if __name__ == "__main__":
    main()
