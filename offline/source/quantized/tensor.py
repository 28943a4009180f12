"""A tensor that is stored as codes and scales, and reads as the numbers that they mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

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

    def bound(self) -> float | None:
        """What no number exceeds in size, or NaN if a scale is; None if only reading all codes could tell.

        Raises ValueError as ``load_float32`` does.
        """
        return None

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The stored tensors."""
        return tuple(part for part in vars(self).values() if isinstance(part, StoredTensor))

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


def halves(numbers: torch.Tensor) -> torch.Tensor:
    """A table for ``decode_bytes``, of the numbers that the sixteen codes of four bits mean."""
    high, low = torch.meshgrid(numbers.float(), numbers.float(), indexing="ij")
    return torch.stack((low, high), -1).flatten().view(torch.int64)


def decode_bytes(packed: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The numbers in float32 of codes of four bits, of which a byte has two, the first in its lower half.

    packed: of any integer dtype, the bytes of each from the lowest up. The last dimension becomes as many times longer.
    table: of ``halves``: the two numbers that a byte means as one integer, so that they are looked up at once.
    """
    # Unlike ``contiguous``, this gives a dimension of one element the stride that a view needs.
    ordered = packed.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    numbers = table.index_select(0, ordered.flatten().int()).view(torch.float32)
    return numbers.view(*packed.shape[:-1], -1)


def load_scale(scale: StoredTensor, index: int | None = None) -> torch.Tensor:
    """Scales in float32. Bytes are exponents: 2 to the power of the byte less 127, and NaN for 255 (E8M0)."""
    loaded = scale.load(index)
    return (loaded.view(torch.float8_e8m0fnu) if loaded.dtype == torch.uint8 else loaded).float()
