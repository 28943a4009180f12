"""Comparing a checkpoint with the source that it was converted from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from alphaq_vllm import packing
from alphaq_vllm.format import GRID, PACKED, SCALE, AlphaQSpec, LinearFormat
from offline.allocation.widths import Choice
from offline.messages import some
from offline.operations.dequantize import dequantize_linear
from offline.operations.plan import Job, plan
from offline.progress import Progress
from offline.quantizers.groups import reaching_step
from offline.quantizers.symmetric import largest_mse
from offline.source.checkpoint import Checkpoint
from offline.source.families import ExpertMatrix, by_expert, find_drafts, find_experts, load_weight
from offline.source.linear import LinearLayer, stored_linear_layers
from offline.source.selection import of_modules
from offline.source.stored import LazyTensor
from offline.threads import one_thread

# A scale has 8 significant bits, so no grid meets a weight more exactly than this.
_ROUNDING = 2.0**-16


@dataclass(frozen=True)
class WidthError:
    """Quantization error of all matrices of a width: their number, and squared error over squared weight."""

    matrices: int
    relative_mse: float


@one_thread()
def compare(checkpoint: Checkpoint, widths: Mapping[ExpertMatrix, int], source: Checkpoint) -> dict[int, WidthError]:
    """Compare every tensor, and return the error at each width.

    widths: of the checkpoint's matrices.
    Raises ValueError, naming the tensor, for a matrix further from the source than its width allows, for any other
    tensor that is not the source's bit for bit, and for a config or tensors that a conversion would not give.
    """
    spec = AlphaQSpec.from_dict(checkpoint.config["quantization_config"])
    every = {matrix.name: num_bits for matrix, num_bits in widths.items()}
    drafts = {matrix: every[matrix.name] for matrix in find_drafts(source).matrices if matrix.name in every}
    experts = of_modules(find_experts(source), spec.num_bits.keys() - {matrix.module for matrix in drafts})
    bits = {matrix.name: every[matrix.name] for matrix in experts.matrices}
    linear = stored_linear_layers(checkpoint, spec.linear)
    job = Job(str(source.path), source, experts, spec.group_size, linear=linear, drafts=drafts)
    planned = plan(job, Choice(bits), {})
    if planned.config != checkpoint.config:
        different = [k for k in planned.config if planned.config[k] != checkpoint.config.get(k)]
        raise ValueError(
            f"{checkpoint.path}: config.json: expected the source's with the bit map, got another "
            f"{some(different or set(checkpoint.config) - set(planned.config))}"
        )
    specs = {name: tensor for shard in planned.shards for name, tensor in shard.specs.items()}
    if different := sorted(specs.keys() ^ checkpoint.tensors.keys()):
        raise ValueError(
            f"{checkpoint.path}: expected the tensors that the source gives, got a difference in {some(different)}"
        )
    # In the source's layout, which may be another than that of the checkpoint.
    stored_bits = {matrix: bits[matrix.name] for matrix in experts.matrices} | drafts
    errors = _compare_matrices(checkpoint, stored_bits, source, spec)
    for layer, stored in linear.items():
        _compare_linear(checkpoint, layer, stored, source)
    names = (*(matrix.name for matrix in stored_bits), *spec.linear)
    quantized = {f"{name}.{suffix}" for name in names for suffix in (PACKED, SCALE, GRID)}
    for piece in (piece for shard in planned.shards for piece in shard.pieces):
        if piece.compute and quantized.isdisjoint(piece.specs):
            for name, tensor in piece.compute().items():
                _check_equal(name, checkpoint.load(name), tensor)
    return errors


def greatest_mse(weight: torch.Tensor, num_bits: int, group_size: int) -> float:
    """The greatest mean squared error that a matrix of a width may have.

    That is half a step in every weight for grids that reach 0 and the extremes of groups, which is three times what
    rounding to nearest gives and leaves room for quantizers that minimize another error; at most the weights' square.
    """
    groups = weight.double().view(len(weight), -1, group_size)
    step = reaching_step(groups.amax(-1).clamp(min=0), -groups.amin(-1).clamp(max=0), num_bits)
    # No step of a row is less than a 16th of the largest, and a step may be a 13th larger than asked.
    step = torch.maximum(step * 14 / 13, step.amax(1, keepdim=True) / 16)
    square = groups.square().mean()
    return float(torch.minimum(step.square().mean() / 4, square) + _ROUNDING * square)


def _compare_matrices(
    checkpoint: Checkpoint, widths: Mapping[ExpertMatrix, int], source: Checkpoint, spec: AlphaQSpec
) -> dict[int, WidthError]:
    count, error, energy = ({num_bits: 0.0 for num_bits in sorted(set(widths.values()))} for _ in range(3))
    with Progress("compare", sum(matrix.numel for matrix in widths)) as progress:
        for expert in by_expert(tuple(widths)):
            # Of what its first matrices give down, which is fitted to that.
            change = 0.0
            for matrix in expert:
                num_bits = widths[matrix]
                weight = load_weight(source, matrix).cpu()
                packed, scale, grid = (checkpoint.load(f"{matrix.name}.{suffix}") for suffix in (PACKED, SCALE, GRID))
                stored = packing.dequantize(packed, scale, grid, num_bits)
                mse, square = (float(part.double().square().mean()) for part in (stored - weight, weight))
                allowed = greatest_mse(weight, num_bits, spec.group_size)
                allowed += change * square if matrix is expert[-1] else 0.0
                if not mse <= allowed:
                    raise ValueError(
                        f"{matrix.name}: expected a mean squared error of at most {allowed:.3g} at {num_bits} bits, "
                        f"got {mse:.3g}: this is not what conversion of {source.path} gives: convert it again"
                    )
                change += mse / square if square else 0.0
                count[num_bits] += 1
                error[num_bits] += mse * matrix.numel
                energy[num_bits] += square * matrix.numel
                progress.advance(matrix.numel)
    return {b: WidthError(int(count[b]), error[b] / energy[b] if energy[b] else 0.0) for b in count}


def _check_equal(name: str, found: torch.Tensor, expected: torch.Tensor | LazyTensor) -> None:
    tensor = expected if isinstance(expected, torch.Tensor) else expected.load()
    same = (found.shape, found.dtype) == (tensor.shape, tensor.dtype) and torch.equal(_bytes(found), _bytes(tensor))
    if not same:
        raise ValueError(f"{name}: expected the source's values bit for bit, got others: convert the source again")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _compare_linear(
    checkpoint: Checkpoint, layer: LinearLayer, linear_format: LinearFormat, source: Checkpoint
) -> None:
    """Raise ValueError, naming the layer, if it is further from the source than its width allows."""
    weight = source.tensors[layer.tensor].load_float32()
    stored = dequantize_linear(checkpoint, layer, linear_format, torch.float32)[layer.tensor]
    mse = float((stored - weight).double().square().mean())
    allowed = largest_mse(weight, linear_format.num_bits, linear_format.group_size)
    if not mse <= allowed:
        raise ValueError(
            f"{layer.name}: expected a mean squared error of at most {allowed:.3g} at {linear_format.num_bits} bits, "
            f"got {mse:.3g}: this is not what conversion of {source.path} gives: convert it again"
        )
