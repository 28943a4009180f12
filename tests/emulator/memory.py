"""The emulated GPU's global memory: the tensors that a kernel was given, and nothing between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

WARP = 32


class MemoryFault(Exception):
    """An access that is out of bounds, misaligned, of bytes that nobody wrote, or not ordered by a barrier."""


class GlobalMemory:
    """Tensors on the CPU, at their own addresses.

    early: whether the running block was launched before the kernel ahead has ended, and has not waited for that yet.
    ahead: first and last address of the tensors that the kernel ahead writes. written: those that this one writes.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], ahead: Sequence[tuple[int, int]] = ()) -> None:
        self.early = False
        self.ahead = ahead
        self.written: set[tuple[int, int]] = set()
        spans = {t.data_ptr(): t.view(torch.uint8).view(-1).numpy() for t in tensors if t.numel()}
        self.starts = np.array(sorted(spans), dtype=np.int64)
        self.pieces = [spans[start] for start in self.starts.tolist()]
        self.ends = self.starts + [len(piece) for piece in self.pieces]

    def _locate(self, addresses: np.ndarray, size: int) -> list[tuple[np.ndarray | slice, np.ndarray, np.ndarray]]:
        """For each tensor: which of the addresses lie in it, the tensor's words of that size, and their indices."""
        addresses = addresses.astype(np.int64)
        if not len(addresses):
            return []
        pieces = np.searchsorted(self.starts, addresses, "right") - 1
        if (pieces < 0).any() or (addresses + size > self.ends[pieces]).any():
            raise MemoryFault(f"global memory: {size} bytes outside of every tensor")
        if (addresses % size).any():
            raise MemoryFault(f"global memory: {size} bytes at an address that is no multiple of {size}")
        found = []
        for piece in np.unique(pieces):
            chosen = pieces == piece
            words = self.pieces[piece]
            words = words[: len(words) // size * size].view(f"V{size}" if size == 16 else f"u{size}")
            found.append((chosen, words, (addresses[chosen] - self.starts[piece]) // size))
        return found

    def check(self, addresses: np.ndarray) -> None:
        """Raise MemoryFault if one of the addresses is outside of every tensor."""
        self._locate(addresses, 1)

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """The bytes at each address: ``[len(addresses), size]`` uint8."""
        if self.early and any(((addresses >= first) & (addresses <= last)).any() for first, last in self.ahead):
            raise MemoryFault("global memory: read of what the kernel ahead writes, before griddepcontrol.wait")
        out = np.zeros((len(addresses), size), np.uint8)
        for chosen, words, indices in self._locate(addresses, size):
            out[chosen] = words[indices].view(np.uint8).reshape(-1, size)
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Write ``values [len(addresses), size]`` uint8."""
        if self.early:
            raise MemoryFault("global memory: write before griddepcontrol.wait")
        size = values.shape[1]
        for chosen, words, indices in self._locate(addresses, size):
            self.written.add((words.ctypes.data, words.ctypes.data + words.nbytes - 1))
            words[indices] = np.ascontiguousarray(values[chosen]).view(words.dtype).reshape(-1)
