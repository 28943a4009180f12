"""Block-fp8 checkpoints such as DeepSeek-V3's: float8 weights, whose blocks share a scale, as the values they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from alphaq_vllm.format import TensorSpec
from offline.source.stored import StoredTensor

SCALE_SUFFIX = "_scale_inv"

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class BlockScaledTensor:
    """A stored tensor ``weight * scale``, where each scale is that of a block in the last two dimensions.

    weight: ``[..., out_features, in_features]`` float8. scale: ``[..., ceil(out_features / block[0]),
    ceil(in_features / block[1])]``, called the inverse scale because it undoes a scaling (DeepSeek-V3, arXiv
    2412.19437). The two may lie in different files.
    """

    weight: StoredTensor
    scale: StoredTensor
    block: tuple[int, int]

    @property
    def spec(self) -> TensorSpec:
        """The tensor's shape, and bfloat16: the dtype of ``load``."""
        return TensorSpec(self.weight.spec.shape, torch.bfloat16)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.weight.nbytes + self.scale.nbytes

    def load(self, index: int | None = None) -> torch.Tensor:
        """The values of the tensor, or of the slice ``index`` of its first dimension, rounded to bfloat16."""
        return self.load_float32(index).bfloat16()

    def load_float32(self, index: int | None = None) -> torch.Tensor:
        """The same, computed in float32."""
        values, scales = self.weight.load_float32(index), self.scale.load_float32(index)
        for dim, size in ((-2, self.block[0]), (-1, self.block[1])):
            scales = scales.repeat_interleave(size, dim).narrow(dim, 0, values.shape[dim])
        return values.mul_(scales)


def weight_block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, if ``config.json`` declares a block-fp8 checkpoint."""
    match config.get("quantization_config"):
        case {"quant_method": "fp8", "weight_block_size": [int(rows), int(columns)]} if rows > 0 and columns > 0:
            return rows, columns
    return None


def join_scales(
    tensors: Mapping[str, StoredTensor], block: tuple[int, int]
) -> dict[str, StoredTensor | BlockScaledTensor]:
    """The tensors of a block-fp8 checkpoint with each float8 tensor joined to its scale, in the same order.

    Raises ValueError for a float8 tensor without a scale of the right shape and dtype, and for any other scale.
    """
    joined: dict[str, StoredTensor | BlockScaledTensor] = {}
    scales = set()
    for name, tensor in tensors.items():
        joined[name] = tensor
        if tensor.spec.dtype in _FLOAT8:
            joined[name] = BlockScaledTensor(tensor, _scale(tensors, name, block), block)
            scales.add(f"{name}{SCALE_SUFFIX}")
    for name in tensors:
        if name.endswith(SCALE_SUFFIX) and name not in scales:
            raise ValueError(
                f"{name}: expected a float8 tensor {name.removesuffix(SCALE_SUFFIX)!r} that it scales, got none: "
                "download the checkpoint again"
            )
    return {name: tensor for name, tensor in joined.items() if name not in scales}


def _scale(tensors: Mapping[str, StoredTensor], name: str, block: tuple[int, int]) -> StoredTensor:
    scale, shape = tensors.get(f"{name}{SCALE_SUFFIX}"), tensors[name].spec.shape
    if scale is None:
        raise ValueError(
            f"{name}: expected {name}{SCALE_SUFFIX} as the scale of a float8 tensor, got none: "
            "download the checkpoint again"
        )
    if len(shape) < 2:
        raise ValueError(f"{name}: expected a float8 tensor of two or more dimensions, got shape {shape}")
    expected = *shape[:-2], *(-(-size // rows) for size, rows in zip(shape[-2:], block, strict=True))
    if scale.spec.shape != expected or scale.spec.dtype not in _SCALE_DTYPES:
        raise ValueError(
            f"{name}{SCALE_SUFFIX}: expected a float32 or bfloat16 scale of shape {expected} for blocks of {block}, "
            f"got {scale.spec.dtype} of shape {scale.spec.shape}"
        )
    return scale
