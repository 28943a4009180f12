"""All measurements for one purpose, by one command.

    python -m benchmarks.suite short            minutes on a laptop: the embedded model in each format
    python -m benchmarks.suite gpu              kernels, conversion and serving at the shapes of known models
    python -m benchmarks.suite paper --text FILE    the paper's models: quality and zero-shot accuracy at each size

``--dry-run`` prints the commands and checks their arguments, without running any. Each appends its lines to
``benchmarks/results``, and the last writes the page. AWQ and GPTQ need ``make .venv-peers/.installed``, zero-shot
accuracy ``pip install ".[eval]"``; the paper's text is the test part of WikiText-2, its models come from the Hub.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

ROOT = Path(__file__).parents[1]
EMBEDDED = Path("tests", "models", "docs-moe")
PAPER_MODELS = ("mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen1.5-MoE-A2.7B", "deepseek-ai/DeepSeek-V2-Lite")
PAPER_BITS = ("2.5", "3", "3.5")
# Layers of each generated model: enough for the experts to outweigh the rest, few enough for one GPU in bfloat16.
GENERATED = {"qwen1.5-moe-a2.7b": 24, "mixtral-8x7b": 8, "deepseek-v2-lite": 27}
Command = tuple[str, ...]


def short(work: Path, text: Path) -> Iterator[Command]:
    """The embedded model; the peers' calibration text is Python's own help, which is not in the text reported on."""
    model, peers = str(EMBEDDED), ("gptq", "awq")
    yield (
        "benchmarks.convert", "--model", model, "--calibration", str(text), "--samples", "64", "--context", "256",
        "--out", str(work),
    )  # fmt: skip
    held_out = str(EMBEDDED / "held-out.txt")
    quality = ("benchmarks.quality", model, "--text", held_out, "--tokens", "8192", "--context", "256", "--again")
    checkpoints = [f"--checkpoint={name.upper()} 4 bits by llm-compressor={work / name}" for name in peers]
    yield (*quality, "--bits", "2.5,3.5", "--preset", "short", *checkpoints)
    formats = ",".join(["bf16", "alphaq:3.5", *(f"{name}={work / name}" for name in peers)])
    yield (
        "benchmarks.serving", model, "--text", held_out, "--formats", formats, "--concurrency", "1,8,32",
        "--serve-args=--enforce-eager",
    )  # fmt: skip
    yield ("benchmarks.report",)


def gpu(work: Path, text: Path) -> Iterator[Command]:
    """Random weights of true shapes: they say nothing about quality, and all about speed."""
    yield ("benchmarks.kernels",)
    for name, layers in GENERATED.items():
        model, out = work / name, work / f"{name}-quantized"
        yield ("benchmarks.generate", name, str(model), "--layers", str(layers))
        yield ("benchmarks.convert", "--model", str(model), "--calibration", str(text), "--out", str(out))
        formats = ["bf16", *(f"alphaq:{bits}" for bits in ("2.5", "3", "3.5", "4"))]
        formats += [f"{peer}={out / peer}" for peer in ("gptq", "awq")]
        yield (
            "benchmarks.serving", str(model), "--text", str(EMBEDDED / "held-out.txt"), "--formats", ",".join(formats),
            "--input", "512", "--output", "128",
        )  # fmt: skip
    yield ("benchmarks.report",)


def paper(work: Path, text: Path) -> Iterator[Command]:
    """The main table: perplexity, KL divergence and accuracy of three models before and at each size."""
    for model in PAPER_MODELS:
        yield (
            "benchmarks.quality", model, "--text", str(text), "--tokens", "327680", "--context", "2048",
            "--bits", ",".join(PAPER_BITS), "--dtype", "bfloat16",
        )  # fmt: skip
        yield ("benchmarks.zero_shot", model)
        for bits in PAPER_BITS:
            out = work / f"{Path(model).name}-{bits}"
            yield ("offline.convert", model, str(out), "--bits", bits)
            yield ("benchmarks.zero_shot", str(out))
    yield ("benchmarks.report",)


PRESETS = {"short": short, "gpu": gpu, "paper": paper}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="short, gpu: for calibration (default: Python's help)"
    )
    parser.add_argument("--work", type=Path, help="where checkpoints go (default: a temporary place)")
    parser.add_argument("--dry-run", action="store_true", help="print and check the commands only")
    args = parser.parse_args()
    if args.preset == "paper" and not args.text:
        parser.error("paper: expected the text of perplexity: add --text FILE")
    with tempfile.TemporaryDirectory(prefix="alphaq-suite-", dir=args.work) as folder:
        work = Path(folder)
        text = args.text.resolve() if args.text else work / "python-help.txt"
        if not args.text:
            text.write_text("\n\n".join(topics.values()))
        for module, *arguments in PRESETS[args.preset](work, text):
            print(f"$ python -m {shlex.join([module, *arguments])}", flush=True)
            if args.dry_run:
                importlib.import_module(module).build_parser().parse_args(arguments)
                continue
            status = subprocess.run([sys.executable, "-m", module, *arguments], check=False, cwd=ROOT).returncode
            if status:
                sys.exit(status)


if __name__ == "__main__":
    main()
