"""The text that GPTQ calibrates on."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from offline.quantizers.quantize import QUANTIZERS
from offline.source.checkpoint import Checkpoint
from offline.source.families import Experts

# More of them than this for each input feature of the average expert hardly help (benchmarks/results, preset tokens).
TOKENS_PER_FEATURE, MAX_TOKENS = 32, 65536
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken")


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on.

    files: of UTF-8 text, none for text of the model's own; tokens: at most so many of it, None for as many as help, for
    each of which memory holds three vectors of the hidden size in float32; length: of a window, the tokens that the
    model sees together.
    """

    files: tuple[Path, ...] = ()
    tokens: int | None = None
    length: int = 512

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"--calibration-length: expected a number of tokens from 1 up, got {self.length}")
        if self.tokens is not None and self.tokens < self.length:
            raise ValueError(
                f"--calibration-tokens: expected at least the {self.length} of --calibration-length, got {self.tokens}"
            )


def add_quantizer_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``calibration_from`` reads, and ``--quantizer``."""
    group = parser.add_argument_group("quantizer", argument_default=argparse.SUPPRESS)
    group.add_argument(
        "--quantizer",
        choices=QUANTIZERS,
        help="gptq (default where the converter can run the model): least error of what the model computes; mse "
        "(default elsewhere): least squared error; rtn: round to nearest; hqq: half-quadratic",
    )
    group.add_argument(
        "--calibration",
        dest="files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="text for gptq (default: what the model writes itself)",
    )
    group.add_argument(
        "--calibration-tokens",
        dest="tokens",
        type=int,
        metavar="N",
        help=f"to use at most (default {MAX_TOKENS}, or {TOKENS_PER_FEATURE} for each input feature of an expert, if "
        "that is less); each takes 12 bytes of memory times the hidden size",
    )
    group.add_argument(
        "--calibration-length",
        dest="length",
        type=int,
        metavar="N",
        help=f"tokens that the model sees together (default {Calibration.length})",
    )


def calibration_from(args: argparse.Namespace) -> Calibration | None:
    """The calibration that the options ask for, if any."""
    given = {field: getattr(args, field) for field in ("files", "tokens", "length") if field in args}
    return Calibration(**{**given, "files": tuple(given.get("files", ()))}) if given else None


def check_quantizer(quantizer: str, calibration: Calibration | None) -> None:
    """Raise ValueError for an unknown quantizer, and for a calibration of one that makes no use of it."""
    if quantizer not in QUANTIZERS:
        raise ValueError(f"--quantizer: expected one of {', '.join(QUANTIZERS)}, got {quantizer!r}")
    if quantizer != "gptq" and calibration is not None:
        raise ValueError(f"--calibration: expected --quantizer gptq, got {quantizer}, which works without text")


def default_tokens(source: Checkpoint, experts: Experts) -> int:
    """As many tokens as help to calibrate this model."""
    routed = source.config.get("num_experts_per_tok", 2) / experts.num_experts
    return min(MAX_TOKENS, math.ceil(TOKENS_PER_FEATURE * experts.matrices[0].shape[1] / routed))


def read_windows(source: Checkpoint, calibration: Calibration, max_tokens: int) -> torch.Tensor:
    """Tokens of the text, by the source's own tokenizer: ``[windows, length]`` int64, spread evenly over all the text.

    max_tokens: at least a window.
    Raises ValueError or OSError for text that cannot be read or is shorter than a window, and for a source without
    tokenizer or with a shorter context than a window.
    """
    context = source.config.get("max_position_embeddings")
    if isinstance(context, int) and calibration.length > context:
        raise ValueError(
            f"--calibration-length: expected at most the {context} tokens of max_position_embeddings in config.json, "
            f"got {calibration.length}"
        )
    tokens = torch.tensor(_tokenize(source, [_read(file) for file in calibration.files]))
    windows = tokens[: len(tokens) // calibration.length * calibration.length].view(-1, calibration.length)
    if not len(windows):
        raise ValueError(
            f"--calibration: expected at least {calibration.length} tokens of text, got {len(tokens)}: "
            "give more text or lower --calibration-length"
        )
    count = min(len(windows), max_tokens // calibration.length)
    return windows[torch.arange(count) * len(windows) // count]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--calibration: {file}: expected UTF-8 text, got {error}") from error


def _tokenize(source: Checkpoint, texts: list[str]) -> list[int]:
    from transformers import AutoTokenizer

    way_out = "download the tokenizer's files or use another quantizer"
    # Without any of them transformers makes an empty tokenizer for some models.
    if not any(file for pattern in _VOCABULARIES for file in source.path.glob(pattern)):
        raise ValueError(f"{source.path}: expected a tokenizer for the calibration text, got none: {way_out}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"{source.path}: expected a tokenizer for the calibration text, got {error}: {way_out}"
        ) from error
    return [token for text in texts for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
