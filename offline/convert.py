"""``python -m offline.convert``: from a Hugging Face checkpoint to an AlphaQ checkpoint, without calibration data.

Everything that can be wrong with the arguments or the source is checked first. Then the expert matrices are measured,
their widths chosen, and the checkpoint quantized and written, with one matrix in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from alphaq_vllm.format import (
    PACKED,
    SCALE,
    SUPPORTED_GROUP_SIZES,
    ZERO,
    TensorSpec,
    matrix_tensors,
    stored_bits_per_weight,
)
from offline.checkpoint import Checkpoint, open_checkpoint
from offline.cli import Parser, add_output_options, run
from offline.families import ExpertMatrix, Experts, find_experts
from offline.measure import load_weight, measure
from offline.quantize import quantize
from offline.summary import Summary, count_widths
from offline.widths import (
    NOISE_KINDS,
    Budget,
    Choice,
    average_bits,
    check_bit_map,
    check_group_size,
    choose,
    read_bit_map,
    to_spec,
)
from offline.writer import (
    DEFAULT_SHARD_BYTES,
    Piece,
    Shard,
    check_output,
    copied,
    new_directory,
    plan_shards,
    write_checkpoint,
)

_DESCRIPTION = """Convert a Mixture-of-Experts checkpoint so that every expert matrix has a bit-width of its own.

The widths are chosen without calibration data, from the spectra of the weights, so that their average keeps to a
budget. Everything but the routed experts is copied unchanged."""

_EXAMPLES = """\
  python -m offline.convert Qwen/Qwen1.5-MoE-A2.7B qwen-alphaq --bits 3.5
  python -m offline.convert ./mixtral ./mixtral-alphaq --bits 2.5 --candidate-bits 1,2,3,4
  python -m offline.convert ./model ./model-alphaq --bit-map bit_map.json"""

_BUDGET_OPTIONS = {"average_bits": "--bits", "widths": "--candidate-bits", "gamma": "--gamma", "noise": "--noise"}


def convert(
    model: str,
    out: Path,
    widths: Budget | Mapping[str, int],
    group_size: int = 128,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Summary:
    """Convert a checkpoint.

    model: a directory or the name of a model on the Hugging Face Hub; out: a directory that is empty or does not
    exist; widths: a budget to choose them under, or bits by matrix name; group_size: input columns that share a scale
    and a zero point; max_shard_bytes: of data in one file.
    Raises ValueError or OSError for anything that is wrong, and then leaves no output.
    """
    start = time.monotonic()
    source = open_checkpoint(model)
    experts = find_experts(source)
    check_group_size(group_size, experts.matrices)
    if not isinstance(widths, Budget):
        check_bit_map(widths, experts.matrices)
    out = out.resolve()
    check_output(out, source.path.resolve(), _greatest_size(source, experts, widths, group_size))
    with new_directory(out) as directory:
        choice = _choose(source, experts, widths, group_size)
        shards = plan_shards(_pieces(source, experts, choice.bits, group_size), max_shard_bytes)
        config = {**source.config, "quantization_config": to_spec(choice.bits, experts, group_size).to_dict()}
        write_checkpoint(directory, shards, config, source.sidecars)
    seconds = time.monotonic() - start
    return _summary(model, source, experts, choice, group_size, str(out), shards, seconds)


def main(arguments: Sequence[str]) -> None:
    """The command."""
    args = _parser().parse_args(arguments)
    options = {field: getattr(args, field) for field in _BUDGET_OPTIONS if field in args}
    if args.bit_map and options:
        given = ", ".join(_BUDGET_OPTIONS[field] for field in options)
        raise ValueError(f"--bit-map: expected to be the only choice of widths, got also {given}: leave out one")
    widths = read_bit_map(args.bit_map) if args.bit_map else Budget(**options)
    summary = convert(args.model, args.out, widths, args.group_size, args.max_shard_size)
    print(json.dumps(summary.to_dict()) if args.json else summary)


def _parser() -> Parser:
    parser = Parser("convert", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("model", help="directory of a Hugging Face checkpoint, or name of a model on the Hub")
    parser.add_argument("out", type=Path, help="output directory: new or empty")
    # The defaults of these are Budget's; absent unless given, they show when a bit map is given too.
    budget = parser.add_argument_group("choice of widths", argument_default=argparse.SUPPRESS)
    either = budget.add_mutually_exclusive_group()
    either.add_argument("--bits", dest="average_bits", type=float, metavar="AVERAGE", help="at most (default 3.5)")
    either.add_argument("--bit-map", type=Path, default=None, metavar="FILE", help='JSON file {"<matrix name>": bits}')
    budget.add_argument("--candidate-bits", dest="widths", type=_widths, metavar="LIST", help="default: 2,3,4")
    budget.add_argument("--gamma", type=_gamma, metavar="auto|NUMBER", help="exponent of importance (default auto)")
    budget.add_argument("--noise", choices=NOISE_KINDS, help="error to minimise (default measured)")
    parser.add_argument("--group-size", type=int, choices=SUPPORTED_GROUP_SIZES, default=128, help="default 128")
    add_output_options(parser)
    return parser


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected widths such as 2,3,4, got {text!r}") from None


def _gamma(text: str) -> float | None:
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected auto or a number, got {text!r}") from None


def _choose(source: Checkpoint, experts: Experts, widths: Budget | Mapping[str, int], group_size: int) -> Choice:
    if isinstance(widths, Budget):
        return choose(measure(source, experts.matrices, widths.measured_widths, group_size), widths)
    return Choice(widths)


def _greatest_size(source: Checkpoint, experts: Experts, widths: Budget | Mapping[str, int], group_size: int) -> int:
    """Bytes that the output cannot exceed, but for headers."""
    bits = widths.average_bits if isinstance(widths, Budget) else average_bits(widths, experts.matrices)
    unchanged = source.nbytes - _source_bytes(source, experts)
    return unchanged + round(experts.numel * stored_bits_per_weight(bits, group_size) / 8)


def _pieces(source: Checkpoint, experts: Experts, bits: Mapping[str, int], group_size: int) -> list[Piece]:
    matrices = {matrix.tensor: matrix for matrix in experts.matrices}
    pieces = []
    for name in source.tensors:
        if matrix := matrices.get(name):
            num_bits = bits[matrix.name]
            specs = _specs(matrix, num_bits, group_size)
            pieces.append(Piece(specs, partial(_quantized, source, matrix, num_bits, group_size)))
        else:
            pieces.append(copied(source, name))
    return pieces


def _specs(matrix: ExpertMatrix, num_bits: int, group_size: int) -> dict[str, TensorSpec]:
    specs = matrix_tensors(*matrix.shape, num_bits, group_size)
    return {f"{matrix.name}.{suffix}": spec for suffix, spec in specs.items()}


def _quantized(source: Checkpoint, matrix: ExpertMatrix, num_bits: int, group_size: int) -> dict[str, torch.Tensor]:
    quantized = quantize(load_weight(source, matrix), num_bits, group_size)
    tensors = {PACKED: quantized.packed, SCALE: quantized.scale, ZERO: quantized.zero_point}
    return {f"{matrix.name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def _source_bytes(source: Checkpoint, experts: Experts) -> int:
    return sum(source.spec(matrix.tensor).nbytes for matrix in experts.matrices)


def _summary(
    model: str,
    source: Checkpoint,
    experts: Experts,
    choice: Choice,
    group_size: int,
    out: str,
    shards: Sequence[Shard],
    seconds: float,
) -> Summary:
    stored = [_specs(matrix, choice.bits[matrix.name], group_size).values() for matrix in experts.matrices]
    experts_after = sum(spec.nbytes for specs in stored for spec in specs)
    return Summary(
        source=model,
        output=out,
        family=experts.model_type,
        layers=len(experts.modules),
        experts=experts.num_experts,
        matrices=len(experts.matrices),
        group_size=group_size,
        bits=average_bits(choice.bits, experts.matrices),
        stored_bits=8 * experts_after / experts.numel,
        size_before=source.nbytes,
        size_after=sum(shard.nbytes for shard in shards),
        experts_before=_source_bytes(source, experts),
        experts_after=experts_after,
        widths=count_widths(choice.bits),
        alpha=choice.alpha,
        gamma=choice.gamma,
        gap=choice.gap,
        seconds=seconds,
    )


if __name__ == "__main__":
    run(main)
