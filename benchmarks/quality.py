"""What quantization costs a model: perplexity, KL divergence and agreement with the model before, at each size.

    python -m benchmarks.quality MODEL --text FILE... [--bits 2,2.5,3,3.5,4] [--preset headline] [--calibration FILE]
    python -m benchmarks.quality MODEL --text FILE... --checkpoint NAME=DIRECTORY

Converts MODEL with every variant of a preset at every budget and runs the result in transformers on the text, beside
MODEL itself. ``--checkpoint`` measures a checkpoint that llm-compressor made of MODEL (see
``benchmarks.peer_checkpoint``). Each result is a line of JSON in ``benchmarks/results/quality.jsonl``; what is there
already, of the same model, text and settings, is not measured again without ``--again``.

Presets (``--preset``, several with commas): see ``PRESETS``. Choose defaults on one text and report on another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils.logging import disable_progress_bar

from benchmarks.compressed import write_plain
from benchmarks.machine import machine
from benchmarks.scoring import Reference, load_model, windows
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts
from offline.source.fingerprint import fingerprint

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
# Arguments of offline.convert by name, for each preset.
WEIGHTS_ALONE = "--noise measured --quantizer mse"
# The default where the converter cannot run a model, and when vLLM quantizes at load.
EXPERT = "--noise expert --quantizer mse"
PRESETS = {
    # What a user chooses between, all without data.
    "headline": {
        "uniform, rtn": "--mode uniform --quantizer rtn",
        "uniform, mse": "--mode uniform --quantizer mse",
        "uniform, gptq on its own text": "--mode uniform",
        "weights alone: alpha, mse": WEIGHTS_ALONE,
        "weights alone: expert, mse": EXPERT,
        "default, but mse": "--quantizer mse",
        "default": "",
    },
    "short": {
        "uniform, rtn": "--mode uniform --quantizer rtn",
        "weights alone: alpha, mse": WEIGHTS_ALONE,
        "default": "",
    },
    # Where nothing runs the model; benchmarks.weights_only has more maps, and controls.
    "weights": {
        "uniform, mse": "--mode uniform --quantizer mse",
        "random, mse": "--mode random --quantizer mse",
        "weights alone: expert, mse": EXPERT,
        "weights alone: the paper's, mse": "--preset paper --quantizer mse",
    },
    # What a calibration text adds.
    "calibrated": {"uniform, gptq on a text": "--mode uniform", "default, gptq on a text": ""},
    "quantizers": {f"uniform, {name}": f"--mode uniform --quantizer {name}" for name in ("rtn", "hqq", "mse", "gptq")},
    # How much text gptq needs.
    "tokens": {f"default, {n} tokens": f"--calibration-tokens {n}" for n in (512, 1024, 2048, 4096, 16384)},
    # How widths are chosen.
    "allocation": {
        "random, mse": "--mode random --quantizer mse",
        **{f"gamma {gamma}, mse": f"--gamma {gamma} {WEIGHTS_ALONE}" for gamma in (0, 1, 2, 4, 8, 12, 20)},
        **{
            f"gamma {gamma}, {name}, mse": f"--gamma {gamma} {arguments}"
            for gamma in (0, "auto")
            for name, arguments in {
                "analytic noise": "--noise analytic --quantizer mse",
                "propagated noise": "--quantizer mse",
                "per expert": f"--granularity expert {WEIGHTS_ALONE}",
                "widths 1,2,3,4": f"--candidate-bits 1,2,3,4 {WEIGHTS_ALONE}",
                "widths 2,3,4,5": f"--candidate-bits 2,3,4,5 {WEIGHTS_ALONE}",
                "widths 2,3,4,5,6,7,8": f"--candidate-bits 2,3,4,5,6,7,8 {WEIGHTS_ALONE}",
            }.items()
        },
        "default, widths 1,2,3,4": "--candidate-bits 1,2,3,4",
        "default, widths 2,3,4,5": "--candidate-bits 2,3,4,5",
        "default, per expert": "--granularity expert",
    },
    # What a bit is best spent on.
    "groups": {
        **{f"uniform, mse, groups of {n}": f"--mode uniform --quantizer mse --group-size {n}" for n in (32, 64, 128)},
        **{f"default, groups of {n}": f"--group-size {n}" for n in (32, 64, 128)},
    },
}


@dataclass(frozen=True)
class Variant:
    """A way to quantize; arguments: of offline.convert, or checkpoint: one of llm-compressor's."""

    name: str
    arguments: str = ""
    checkpoint: Path | None = None


def variants(presets: list[str], budgets: list[float], calibration: Path | None) -> Iterator[Variant]:
    """Every variant of the presets at every average of bits."""
    for preset in presets:
        for name, arguments in PRESETS[preset].items():
            for bits in budgets:
                text = f" --calibration {shlex.quote(str(calibration))}" if preset == "calibrated" else ""
                yield Variant(name, f"--bits {bits:g} {arguments}".rstrip() + text)


class Bench:
    """One model on one text."""

    def __init__(
        self, model: str, texts: list[Path], tokens: int, context: int, dtype: torch.dtype, work: Path
    ) -> None:
        self.source = open_checkpoint(model)
        self.experts = find_experts(self.source)
        self.dtype = dtype
        self.work = work
        contents = [path.read_text() for path in texts]
        self.tokens = windows(self.source.path, contents, tokens, context)
        self.identity = {
            "model": Path(model).name,
            "architecture": self.source.config["architectures"][0],
            "fingerprint": fingerprint(self.source),
            "text": [path.name for path in texts],
            "text_sha256": hashlib.sha256("\0".join(contents).encode()).hexdigest(),
            "context": context,
            "tokens": self.tokens[:, 1:].numel(),
            "dtype": str(dtype).removeprefix("torch."),
        }

    @cached_property
    def reference(self) -> Reference:
        """Predictions of the model itself."""
        return Reference(load_model(self.source.path, self.dtype), self.tokens, self.work / "reference")

    def measure(self, variant: Variant) -> dict[str, Any]:
        """Quantize and score."""
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            if variant.checkpoint:
                size = _other_size(variant.checkpoint, self.experts.numel)
                write_plain(variant.checkpoint, Path(folder, "plain"), self.source)
                return {**size, **self.score(Path(folder, "plain"))}
            summary = _convert(str(self.source.path), f"{folder}/alphaq", *shlex.split(variant.arguments))
            size = {key: summary[key] for key in ("bits", "stored_bits", "total_size", "gamma", "widths", "starved")}
            return {**size, **self.score(Path(folder, "alphaq"))}

    def score(self, model: Path) -> dict[str, float]:
        """What a model predicts, beside what this one does."""
        score = self.reference.score(load_model(model, self.dtype))
        row = {"perplexity": score.perplexity, "reference_perplexity": math.exp(self.reference.loss)}
        for name in ("loss_increase", "kl", "top1"):
            estimate = getattr(score, name)
            row |= {name: estimate.mean, f"{name}_error": estimate.error}
        return row


def _convert(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "offline.convert", *arguments, "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"{shlex.join(command)}: {finished.stderr.strip().splitlines()[-1]}")
    return json.loads(finished.stdout)


def _other_size(checkpoint: Path, numel: int) -> dict[str, Any]:
    """Bytes of another tool's checkpoint, and its bits per weight of a routed expert."""
    files = sorted(checkpoint.glob("*.safetensors"))
    experts = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                if ".experts." in name:
                    experts += tensors.get_tensor(name).nbytes
    return {"stored_bits": 8 * experts / numel, "total_size": sum(file.stat().st_size for file in files)}


def known(results: Path, identity: dict[str, Any]) -> set[tuple[str, str]]:
    """Name and arguments of what was measured already of this model on this text."""
    lines = results.read_text().splitlines() if results.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["variant"], row["arguments"]) for row in rows if identity.items() <= row.items()}


def record(
    bench: Bench, variant: Variant, measure: Callable[[], dict[str, Any]], results: Path, *, again: bool = False
) -> None:
    """Append a line to the results, unless there is one already that will do."""
    if not again and (variant.name, variant.arguments) in known(results, bench.identity):
        return
    row = {**bench.identity, "variant": variant.name, "arguments": variant.arguments, **measure(), **machine()}
    with results.open("a") as file:
        print(json.dumps(row), file=file)
    print(
        f"{variant.name:28} {row['stored_bits']:.3f} bits  perplexity {row['perplexity']:.3f} "
        f"(before {row['reference_perplexity']:.3f})  KL {row['kl']:.5f} +- {row['kl_error']:.5f}  "
        f"top-1 {row['top1']:.4f}",
        flush=True,
    )


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a Hugging Face checkpoint, or name of a model on the Hub")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--bits", default="2,2.5,3,3.5,4", help="averages of code bits (default 2,2.5,3,3.5,4)")
    parser.add_argument("--preset", default="headline", help=f"out of {', '.join(PRESETS)} (default headline)")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="text for the preset calibrated")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=DIRECTORY", help="measure this too")
    parser.add_argument("--tokens", type=int, default=20480, help="predictions, about (default 20480)")
    parser.add_argument("--context", type=int, default=512, help="tokens in a window (default 512)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of computation")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="where lines are appended")
    parser.add_argument("--again", action="store_true", help="measure what is in the results already, too")
    parser.add_argument("--work", type=Path, help="where temporary checkpoints go (default: the system's place)")
    return parser


def main() -> None:
    """The command."""
    parser = build_parser()
    args = parser.parse_args()
    presets = [name for name in args.preset.split(",") if name]
    if unknown := set(presets) - set(PRESETS):
        parser.error(f"--preset: expected names out of {', '.join(PRESETS)}, got {', '.join(unknown)}")
    if "calibrated" in presets and not args.calibration:
        parser.error("--preset calibrated: expected a text: add --calibration FILE")
    wanted = list(variants(presets, [float(bits) for bits in args.bits.split(",")], args.calibration))
    for checkpoint in args.checkpoint:
        name, _, path = checkpoint.partition("=")
        wanted.append(Variant(name, checkpoint=Path(path)))
    disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        bench = Bench(args.model, args.text, args.tokens, args.context, getattr(torch, args.dtype), Path(work))
        for variant in wanted:
            record(bench, variant, partial(bench.measure, variant), args.results, again=args.again)


if __name__ == "__main__":
    main()
