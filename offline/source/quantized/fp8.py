"""Weights of 8 bits, float8 or int8, whose tensors, rows, experts or blocks share a scale, in all spellings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offline.source.quantized.joining import Parts
from offline.source.quantized.tensor import SCALE_DTYPES, QuantizedTensor, load_scale
from offline.source.stored import StoredTensor

_CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


@dataclass(frozen=True)
class ScaledTensor(QuantizedTensor):
    """A stored tensor ``weight * scale``.

    weight: ``[..., out_features, in_features]`` float8 or int8. scale: its shape when stored does not count; in
    ``scale_shape``, which has the dimensions of ``weight``, each is as large as that of ``weight``, or 1. With a
    ``block``, the last two are divided by its rows and columns, rounded up. The scale of blocks is often called
    inverse, because it undoes a scaling (DeepSeek-V3, arXiv 2412.19437).
    """

    weight: StoredTensor
    scale: StoredTensor
    scale_shape: tuple[int, ...]
    block: tuple[int, int] | None = None

    def load_float32(self, index: int | None = None) -> torch.Tensor:
        """As ``QuantizedTensor`` says."""
        values, shape = self.weight.load_float32(index), self.scale_shape
        if index is None:
            scales = load_scale(self.scale).view(shape)
        else:
            # Where the experts share a scale, it has no slices.
            scales = load_scale(self.scale, index if shape[0] > 1 else None).view(shape[1:])
        for dim, size in zip((-2, -1), self.block or (), strict=False):
            scales = scales.repeat_interleave(size, dim).narrow(dim, 0, values.shape[dim])
        return values.mul_(scales)


@dataclass(frozen=True)
class Fp8Reader:
    """Joins float8 and int8 weights to their scales.

    suffixes: of the scale after the weight's name, first what the method calls it, for messages; blocks: rows and
    columns that may share a scale; others: whether whole tensors, rows or experts may share one too; exponents: whether
    scales are bytes; transposed: whether stacked experts are ``[experts, in_features, out_features]`` and an output
    feature has a scale, of shape ``[experts, 1, out_features]`` or ``[experts, out_features, 1]``.
    """

    suffixes: tuple[str, ...]
    blocks: tuple[tuple[int, int], ...] = ()
    others: bool = True
    exponents: bool = False
    transposed: bool = False

    def __call__(self, name: str, parts: Parts) -> tuple[str, ScaledTensor] | None:
        """As ``Reader`` says."""
        weight = parts.tensors[name]
        # Scales can be float8 too.
        if weight.spec.dtype not in _CODES or name.endswith("_scale"):
            return None
        stem = name.removesuffix(".weight")
        names = [f"{name}{suffix}" for suffix in self.suffixes]
        scale = parts.find([*names, *([f"{stem}.scale"] if stem != name else [])])
        kind, shape = ("an int8" if weight.spec.dtype == torch.int8 else "a float8"), weight.spec.shape
        if scale is None:
            raise ValueError(
                f"{name}: expected {names[0]} as the scale of {kind} tensor, got none: download the checkpoint again"
            )
        if len(shape) < 2:
            raise ValueError(f"{name}: expected {kind} tensor of two or more dimensions, got shape {shape}")
        allowed = (*SCALE_DTYPES, torch.float8_e8m0fnu, *([torch.uint8] if self.exponents else []))
        if scale.spec.dtype in allowed:
            if self.transposed and len(shape) == 3 and sorted(scale.spec.shape) == sorted((shape[0], 1, shape[2])):
                return name, ScaledTensor(shape, 8, weight, scale, (shape[0], 1, shape[2]))
            for block in self.blocks:
                of_blocks = _blocks(shape, block)
                # ModelOpt has the dimensions inside a block too.
                if scale.spec.shape in (of_blocks, (*of_blocks[:-2], of_blocks[-2], 1, of_blocks[-1], 1)):
                    return name, ScaledTensor(shape, 8, weight, scale, of_blocks, block)
            if self.others and (spread := _spread(shape, scale.spec.shape)):
                return name, ScaledTensor(shape, 8, weight, scale, spread)
        fitting = [f"{_blocks(shape, block)} for blocks of {block}" for block in self.blocks]
        fitting += [f"(1,) or {(*shape[:-1], 1)}"] if self.others else []
        raise ValueError(
            f"{names[0]}: expected a float32 or bfloat16 scale of shape {' or '.join(fitting)}, "
            f"got {scale.spec.dtype} of shape {scale.spec.shape}: download the checkpoint again"
        )


def _spread(weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of a scale of tensors, rows or experts with the dimensions of the weight, if it is one."""
    if scale in ((), (1,)):
        return (1,) * len(weight)
    spread = scale + (1,) * (len(weight) - len(scale))
    fits = len(spread) == len(weight) and all(s in (1, w) for s, w in zip(spread, weight, strict=True))
    # One for every weight would be none.
    return spread if fits and spread != weight else None


def _blocks(weight: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    return *weight[:-2], -(-weight[-2] // block[0]), -(-weight[-1] // block[1])
