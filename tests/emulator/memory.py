"""The emulated GPU's memories, which refuse what a GPU would forgive or punish by garbage.

Global memory is the tensors that a kernel was given, and nothing between them. Shared memory knows of each byte whether
it was written, and by which warps it was written and read since the last barrier.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

WARP = 32
UNWRITTEN, IN_FLIGHT, WRITTEN = range(3)


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


class SharedMemory:
    """One block's shared memory."""

    # Where it starts: a multiple of 1024, on which the swizzles of matrix operands rely.
    BASE = 1024

    def __init__(self, size: int) -> None:
        self.bytes = np.zeros(self.BASE + size, np.uint8)
        self.state = np.full(self.BASE + size, UNWRITTEN, np.uint8)
        # One bit for each warp; of the accesses since the last barrier.
        self.writers = np.zeros(self.BASE + size, np.uint32)
        self.readers = np.zeros(self.BASE + size, np.uint32)

    def barrier(self) -> None:
        """Every warp's accesses are ordered before those that follow."""
        self.writers[:] = 0
        self.readers[:] = 0

    def _locate(self, addresses: np.ndarray, size: int) -> np.ndarray:
        addresses = addresses.astype(np.int64)
        if (addresses < self.BASE).any() or (addresses + size > len(self.bytes)).any():
            raise MemoryFault(f"shared memory: {size} bytes outside of the {len(self.bytes) - self.BASE}")
        if (addresses % size).any():
            raise MemoryFault(f"shared memory: {size} bytes at an address that is no multiple of {size}")
        return addresses[:, None] + np.arange(size)

    def load(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        """The bytes at each thread's address: ``[len(addresses), size]`` uint8."""
        places = self._locate(addresses, size)
        self.read(places, (np.uint32(1) << (threads // WARP).astype(np.uint32))[:, None])
        return self.bytes[places]

    def read(self, places: np.ndarray, warps: np.ndarray | np.uint32) -> None:
        """Note that these bytes are read by warps, and check that they may be."""
        if (self.state[places] != WRITTEN).any():
            state = "still in flight" if (self.state[places] == IN_FLIGHT).any() else "that nobody wrote"
            raise MemoryFault(f"shared memory: read of bytes {state}")
        if (self.writers[places] & ~warps).any():
            raise MemoryFault("shared memory: read of what another warp wrote, without a barrier between")
        np.bitwise_or.at(self.readers, places, warps)

    def store(self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray, state: int = WRITTEN) -> None:
        """Write ``values [len(addresses), size]`` uint8, or with IN_FLIGHT only announce that they will be written."""
        places = self._locate(addresses, values.shape[1])
        warps = (np.uint32(1) << (threads // WARP).astype(np.uint32))[:, None]
        others = ((self.writers[places] | self.readers[places]) & ~warps) != 0
        # The same value from several warps is how a compiler writes what they all hold.
        if (others & ((self.bytes[places] != values) | ((self.readers[places] & ~warps) != 0))).any():
            raise MemoryFault("shared memory: write to what another warp used, without a barrier between")
        if (self.state[places] == IN_FLIGHT).any() and state == IN_FLIGHT:
            raise MemoryFault("shared memory: two copies in flight to the same bytes")
        if state == WRITTEN:
            self.bytes[places] = values
            np.bitwise_or.at(self.writers, places, warps)
        self.state[places] = state
