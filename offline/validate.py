"""``python -m offline.validate``: whether a finished AlphaQ checkpoint is whole, and true to its source."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from alphaq_vllm.checksums import check_sums
from alphaq_vllm.format import PACKED, SCALE, ZERO, AlphaQSpec, TensorSpec, matrix_tensors
from offline.cli import Parser, add_json_option, run
from offline.compare import compare
from offline.quantizers.linear import stored_linear_layers
from offline.source.architectures import Family, family_of, num_experts, text_config
from offline.source.checkpoint import Checkpoint, open_checkpoint, some
from offline.source.families import ExpertMatrix

_DESCRIPTION = """Read an AlphaQ checkpoint completely, and check it.

Every file must have its SHA-256 sum, every tensor the name, shape and dtype that format and config promise, and every
number must be finite. With --source, every quantized matrix must be as near to the source's as its width allows, and
all else equal to the source bit for bit. The exit status is 0 if all is well."""

_EXAMPLES = """\
  python -m offline.validate ./model-alphaq
  python -m offline.validate ./model-alphaq --source ./model --json"""


def validate(model: str, source: str | None = None) -> dict[str, Any]:
    """Check a checkpoint, and return what was checked.

    model: an AlphaQ checkpoint; source: what it was converted from.
    Raises ValueError or OSError, naming the file or tensor, for anything that is wrong.
    """
    checkpoint = open_checkpoint(model)
    files = check_sums(checkpoint.path)
    widths = check_alphaq(checkpoint)
    for name, stored in checkpoint.tensors.items():
        if stored.spec.dtype.is_floating_point and not _is_finite(checkpoint.load(name)):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity: convert the source again")
    errors = compare(checkpoint, widths, open_checkpoint(source)) if source else {}
    return {
        "checkpoint": str(checkpoint.path),
        "source": source,
        "files": files,
        "tensors": len(checkpoint.tensors),
        "matrices": len(widths),
        "linear_layers": len(AlphaQSpec.from_dict(checkpoint.config["quantization_config"]).linear),
        "errors": {num_bits: asdict(error) for num_bits, error in errors.items()},
    }


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = Parser("validate", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("checkpoint", help="directory of an AlphaQ checkpoint, or name of one on the Hub")
    parser.add_argument("--source", metavar="MODEL", help="the model that it was converted from")
    add_json_option(parser)
    args = parser.parse_args(arguments)
    result = validate(args.checkpoint, args.source)
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"{result['checkpoint']}: ok: {result['files']} files, {result['tensors']} tensors, "
        f"{result['matrices']} expert matrices, {result['linear_layers']} linear layers"
    )
    for num_bits, error in result["errors"].items():
        print(f"{num_bits:3} bits: {error['matrices']} matrices, relative squared error {error['relative_mse']:.3g}")
    if args.source:
        print("everything else is equal to the source")


def check_alphaq(checkpoint: Checkpoint) -> dict[ExpertMatrix, int]:
    """Check every stored matrix, and return the width of each.

    Raises ValueError, naming the tensor, unless the config follows the format, agrees with the model, and each matrix
    has its tensors and no others, in the right shapes and dtypes, with finite scales and zero points.
    """
    config = checkpoint.config
    if config.get("quantization_config") is None:
        raise ValueError(
            f"{checkpoint.path}: expected an AlphaQ checkpoint, got one that is not quantized: convert it first"
        )
    spec = AlphaQSpec.from_dict(config["quantization_config"])
    family = family_of(checkpoint)
    widths = {
        matrix: num_bits for module in spec.num_bits for matrix, num_bits in _matrices(checkpoint, family, spec, module)
    }
    expected = {
        f"{matrix.name}.{suffix}": tensor
        for matrix, num_bits in widths.items()
        for suffix, tensor in matrix_tensors(*matrix.shape, num_bits, spec.group_size).items()
    }
    for layer, stored in stored_linear_layers(checkpoint, spec.linear).items():
        expected |= layer.specs(stored)
    _check_tensors(checkpoint, family, spec, expected)
    for name in expected:
        if name.endswith((SCALE, ZERO)) and not bool(checkpoint.load(name).isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity: convert the source again")
    return widths


def _matrices(checkpoint: Checkpoint, family: Family, spec: AlphaQSpec, module: str) -> list[tuple[ExpertMatrix, int]]:
    """The matrices that the config promises in a module, with their widths."""
    projections, where = spec.num_bits[module], f"quantization_config.num_bits.{module}"
    if not re.fullmatch(family.module, module) or set(projections) != set(family.projections):
        raise ValueError(
            f"{where}: expected a module named {family.module} with {', '.join(family.projections)}, "
            f"got {', '.join(projections)}"
        )
    gate, _, down = family.projections
    count = num_experts(checkpoint.config)
    if len(projections[gate]) != count:
        raise ValueError(f"{where}: expected {count} experts as config.json says, got {len(projections[gate])}")
    hidden_size = text_config(checkpoint.config).get("hidden_size")
    if type(hidden_size) is not int or hidden_size < 1:
        raise ValueError(f"config.json: hidden_size: expected an integer from 1 up, got {hidden_size!r:.80}")
    # The intermediate size has another key in each family's config; one tensor tells it, and the others must agree.
    first = f"{module}.0.{gate}.{PACKED}"
    if first not in checkpoint.tensors or not checkpoint.spec(first).shape:
        raise ValueError(f"{first}: expected a matrix of packed codes, got none: convert the source again")
    rows = checkpoint.spec(first).shape[0]
    shapes = {name: (hidden_size, rows) if name == down else (rows, hidden_size) for name in family.projections}
    return [
        (ExpertMatrix(module, expert, name, shape, family.native_part(module, name)), projections[name][expert])
        for expert in range(count)
        for name, shape in shapes.items()
    ]


def _check_tensors(
    checkpoint: Checkpoint, family: Family, spec: AlphaQSpec, expected: Mapping[str, TensorSpec]
) -> None:
    missing = [name for name in expected if name not in checkpoint.tensors]
    if missing:
        raise ValueError(f"{checkpoint.path}: expected all tensors of the bit map, got none of {some(missing)}")
    modules = tuple(f"{module}." for module in spec.num_bits)
    suffixes = tuple(f".{suffix}" for suffix in (PACKED, SCALE, ZERO))
    known = {*expected, *(name for module in spec.num_bits for name in family.kept_tensors(module))}
    extra = [n for n in checkpoint.tensors if n not in known and (n.startswith(modules) or n.endswith(suffixes))]
    if extra:
        raise ValueError(f"{checkpoint.path}: expected only the tensors of the bit map, got also {some(extra)}")
    for name, tensor in expected.items():
        if checkpoint.spec(name) != tensor:
            raise ValueError(f"{name}: expected {tensor}, got {checkpoint.spec(name)}: convert the source again")


def _is_finite(tensor: torch.Tensor) -> bool:
    # Formats of 8 bits have no such test of their own.
    return bool((tensor.float() if tensor.dtype.itemsize == 1 else tensor).isfinite().all())


if __name__ == "__main__":
    run(main)
