"""A tensor that is stored as codes and scales, and reads as the numbers that they mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from alphaq_vllm.format import TensorSpec
from offline.source.stored import StoredTensor

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class QuantizedTensor(ABC):
    """Codes with their scales, in the place of one tensor of numbers, which is bfloat16 for who copies it.

    shape: of the numbers, ``[out_features, in_features]`` or with one dimension more for stacked experts; num_bits: of
    a code. Further fields are the stored tensors, which may lie in different files.
    """

    shape: tuple[int, ...]
    num_bits: int

    @abstractmethod
    def load_float32(self, index: int | None = None) -> torch.Tensor:
        """The numbers, or those of the slice ``index`` of the first dimension, computed in float32."""

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The stored tensors."""
        return tuple(part for field in fields(self) if isinstance(part := getattr(self, field.name), StoredTensor))

    @property
    def spec(self) -> TensorSpec:
        """The shape, and bfloat16: the dtype of ``load``."""
        return TensorSpec(self.shape, torch.bfloat16)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(part.nbytes for part in self.parts)

    def load(self, index: int | None = None) -> torch.Tensor:
        """The same as ``load_float32``, rounded to bfloat16; of stacked experts one is in float32 at a time."""
        if index is not None or len(self.shape) < 3:
            return self.load_float32(index).bfloat16()
        tensor = torch.empty(self.shape, dtype=torch.bfloat16)
        for expert, numbers in enumerate(tensor):
            numbers.copy_(self.load(expert))
        return tensor

    def chunks(self, max_bytes: int) -> Iterator[torch.Tensor]:
        """The numbers in bfloat16, flat, a matrix at a time, whatever ``max_bytes`` says: less cannot be decoded."""
        for index in range(self.shape[0]) if len(self.shape) > 2 else (None,):
            yield self.load(index).flatten()


def load_scale(scale: StoredTensor, index: int | None = None) -> torch.Tensor:
    """Scales in float32. Bytes are exponents: 2 to the power of the byte less 127, and NaN for 255 (E8M0)."""
    loaded = scale.load(index)
    return (loaded.view(torch.float8_e8m0fnu) if loaded.dtype == torch.uint8 else loaded).float()
