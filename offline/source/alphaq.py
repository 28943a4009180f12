"""Reading a finished AlphaQ checkpoint: what its config promises, held against what is there."""

from __future__ import annotations

import re
from collections.abc import Mapping

from alphaq_vllm.format import GRID, PACKED, SCALE, AlphaQSpec, TensorSpec, matrix_tensors
from offline.messages import some
from offline.source.architectures import Family, experts_size, num_experts
from offline.source.checkpoint import Checkpoint
from offline.source.families import ExpertMatrix
from offline.source.linear import stored_linear_layers
from offline.source.recognition import family_of


def check_alphaq(checkpoint: Checkpoint) -> dict[ExpertMatrix, int]:
    """Check every stored matrix, and return the width of each.

    Raises ValueError, naming the tensor, unless the config follows the format, agrees with the model, and each matrix
    has its tensors and no others, in the right shapes and dtypes, with finite scales.
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
        if name.endswith(SCALE) and not bool(checkpoint.load(name).isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity: convert the source again")
    return widths


def _matrices(checkpoint: Checkpoint, family: Family, spec: AlphaQSpec, module: str) -> list[tuple[ExpertMatrix, int]]:
    """The matrices that the config promises in a module, with their widths."""
    projections, where = spec.num_bits[module], f"quantization_config.num_bits.{module}"
    if re.fullmatch(family.drafting.module, module):
        family = family.drafting
    if not re.fullmatch(family.module, module) or set(projections) != set(family.projections):
        raise ValueError(
            f"{where}: expected a module named {family.module} with {', '.join(family.projections)}, "
            f"got {', '.join(projections)}"
        )
    first_of, down = family.projections[0], family.down
    count = num_experts(checkpoint.config)
    if len(projections[first_of]) != count:
        raise ValueError(f"{where}: expected {count} experts as config.json says, got {len(projections[first_of])}")
    size = experts_size(checkpoint.config)
    if type(size) is not int or size < 1:
        raise ValueError(f"config.json: hidden_size: expected an integer from 1 up, got {size!r:.80}")
    # The intermediate size has another key in each family's config; one tensor tells it, and the others must agree.
    first = f"{module}.0.{first_of}.{PACKED}"
    if first not in checkpoint.tensors or not checkpoint.spec(first).shape:
        raise ValueError(f"{first}: expected a matrix of packed codes, got none: convert the source again")
    rows = checkpoint.spec(first).shape[0]
    shapes = {name: (size, rows) if name == down else (rows, size) for name in family.projections}
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
    suffixes = tuple(f".{suffix}" for suffix in (PACKED, SCALE, GRID))
    known = {*expected, *(name for module in spec.num_bits for name in family.kept_tensors(module))}
    extra = [n for n in checkpoint.tensors if n not in known and (n.startswith(modules) or n.endswith(suffixes))]
    if extra:
        raise ValueError(f"{checkpoint.path}: expected only the tensors of the bit map, got also {some(extra)}")
    for name, tensor in expected.items():
        if checkpoint.spec(name) != tensor:
            raise ValueError(f"{name}: expected {tensor}, got {checkpoint.spec(name)}: convert the source again")
