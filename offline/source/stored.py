"""Tensors where they lie in a file, read whole or one slice at a time.

Plain file reads: a memory map would count the whole model as resident memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from alphaq_vllm.format import TensorSpec


class LazyTensor(Protocol):
    """A tensor that is read from files when it is needed, whole or one slice of its first dimension at a time."""

    @property
    def spec(self) -> TensorSpec:
        """Shape and dtype of what ``load`` gives."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""

    def load(self, index: int | None = None) -> torch.Tensor:
        """The tensor, or the slice ``index`` of its first dimension."""

    def load_float32(self, index: int | None = None) -> torch.Tensor:
        """The same in float32."""

    def chunks(self, max_bytes: int) -> Iterator[torch.Tensor]:
        """The tensor's elements, flat, some at a time."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, the offset of its first byte there, its shape and dtype."""

    file: Path
    offset: int
    spec: TensorSpec

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.spec.nbytes

    def load(self, index: int | None = None) -> torch.Tensor:
        """Read the tensor, or the slice ``index`` of its first dimension and no other byte.

        Raises OSError if the file has changed since it was opened.
        """
        shape = self.spec.shape if index is None else self.spec.shape[1:]
        nbytes = math.prod(shape) * self.spec.dtype.itemsize
        offset = self.offset + (index or 0) * nbytes
        data = np.fromfile(self.file, np.uint8, count=nbytes, offset=offset)
        if data.nbytes != nbytes:
            raise OSError(f"{self.file}: the file became shorter while it was read")
        if not nbytes:
            return torch.empty(shape, dtype=self.spec.dtype)
        return torch.from_numpy(data).view(self.spec.dtype).view(shape)

    def load_float32(self, index: int | None = None) -> torch.Tensor:
        """The same in float32."""
        return self.load(index).float()

    def chunks(self, max_bytes: int) -> Iterator[torch.Tensor]:
        """The tensor's elements, flat, some at a time, each time in the same memory. Raises OSError as ``load`` does.

        max_bytes: of a chunk; a multiple of 8.
        """
        buffer = torch.empty(min(self.nbytes, max_bytes), dtype=torch.uint8)
        left = self.nbytes
        with self.file.open("rb") as file:
            file.seek(self.offset)
            while left:
                part = buffer[: min(left, max_bytes)]
                if file.readinto(part.numpy().data) != len(part):
                    raise OSError(f"{self.file}: the file became shorter while it was read")
                left -= len(part)
                yield part.view(self.spec.dtype)
