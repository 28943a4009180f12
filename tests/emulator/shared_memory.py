"""The emulated GPU's shared memory, which refuses what a GPU would forgive or punish by garbage.

It knows of each byte whether it was written, which thread used it since the last barrier, and which proxy may read it.
PTX calls a way to memory a proxy: loads, stores and cp.async go by the generic proxy, operands of wgmma and tcgen05.mma
by the async proxy. A write by the first is visible to the second only after fence.proxy.async. The other way round no
fence is needed: the end of a matrix instruction, once it was waited for, is followed by an implicit one.
"""

from __future__ import annotations

import numpy as np

from tests.emulator.memory import WARP, MemoryFault

# What a byte is. FENCED: written, and the async proxy sees it too. MBARRIER: of an object that only mbarrier may use.
UNWRITTEN, IN_FLIGHT, WRITTEN, FENCED, MBARRIER = range(5)
# Which thread used a byte since the last barrier, if not one alone.
NOBODY, SEVERAL = -1, -2
CHUNK = 16


class SharedMemory:
    """One block's shared memory."""

    # Where it starts: a multiple of 1024, on which the swizzles of matrix operands rely.
    BASE = 1024

    def __init__(self, size: int) -> None:
        self.size = size
        length = self.BASE + -(-size // CHUNK) * CHUNK
        self.bytes = np.zeros(length, np.uint8)
        self.state = np.full(length, UNWRITTEN, np.uint8)
        self.writer = np.full(length, NOBODY, np.int16)
        self.reader = np.full(length, NOBODY, np.int16)
        # How many matrix instructions in flight read a chunk of 16 bytes.
        self.operands = np.zeros(length // CHUNK, np.uint8)

    def barrier(self) -> None:
        """Every thread's accesses are ordered before those that follow."""
        self.writer[:] = NOBODY
        self.reader[:] = NOBODY

    def fence_proxy(self) -> None:
        """fence.proxy.async by all threads: the async proxy sees what was written until now."""
        self.state[self.state == WRITTEN] = FENCED

    def _locate(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """The indices of the words of that size."""
        addresses = addresses.astype(np.int64)
        if (addresses < self.BASE).any() or (addresses + size > self.BASE + self.size).any():
            raise MemoryFault(f"shared memory: {size} bytes outside of the {self.size}")
        if (addresses % size).any():
            raise MemoryFault(f"shared memory: {size} bytes at an address that is no multiple of {size}")
        return addresses // size

    def load(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        """The bytes at each thread's address: ``[len(addresses), size]`` uint8."""
        words = self._locate(addresses, size)
        state = self.state.reshape(-1, size)[words]
        if ((state != WRITTEN) & (state != FENCED)).any():
            raise MemoryFault(f"shared memory: read of bytes {_reason(state)}")
        self._read(words, size, threads)
        return self.bytes.reshape(-1, size)[words]

    def _read(self, words: np.ndarray, size: int, threads: np.ndarray) -> None:
        threads = threads.astype(np.int16)[:, None]
        writer = self.writer.reshape(-1, size)[words]
        if ((writer != NOBODY) & (writer != threads)).any():
            raise MemoryFault("shared memory: read of what another thread wrote, without a barrier between")
        readers = self.reader.reshape(-1, size)
        before = readers[words]
        readers[words] = np.where((before == NOBODY) | (before == threads), threads, SEVERAL)
        # Of threads that read the same bytes at once, the last one's number is there now.
        readers[words[(readers[words] != threads).any(1)]] = SEVERAL

    def store(self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray, *, state: int = WRITTEN) -> None:
        """Write ``values [len(addresses), size]`` uint8 by the generic proxy."""
        size = values.shape[1]
        words = self._locate(addresses, size)
        data = self.bytes.reshape(-1, size)
        self._check_write(words, size, threads, data[words] != values)
        data[words] = values
        self.state.reshape(-1, size)[words] = state
        threads = threads.astype(np.int16)[:, None]
        writers = self.writer.reshape(-1, size)
        before = writers[words]
        writers[words] = threads
        last = writers[words]
        # CUDA: of a warp's threads that write the same bytes at once one succeeds, whichever that is.
        if ((data[words] != values) & (last // WARP != threads // WARP)).any():
            raise MemoryFault("shared memory: threads write different values to the same bytes at once")
        same = (before == NOBODY) | (before == threads)
        writers[words] = np.where(same & (last == threads), threads, SEVERAL)
        writers[words[(last != threads).any(1)]] = SEVERAL

    def start_copy(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> None:
        """Announce that these bytes will be written."""
        words = self._locate(addresses, size)
        self._check_write(words, size, threads, np.True_)
        if len(np.unique(words)) < len(words):
            raise MemoryFault("shared memory: two copies in flight to the same bytes")
        self.state.reshape(-1, size)[words] = IN_FLIGHT

    def finish_copy(self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        """What was announced arrives."""
        self.state.reshape(-1, values.shape[1])[addresses // values.shape[1]] = UNWRITTEN
        self.store(addresses, values, threads)

    def _check_write(self, words: np.ndarray, size: int, threads: np.ndarray, differs: np.ndarray) -> None:
        threads = threads.astype(np.int16)[:, None]
        reader, writer = self.reader.reshape(-1, size)[words], self.writer.reshape(-1, size)[words]
        others_wrote = (writer != NOBODY) & (writer != threads)
        # The same value from several threads is how a compiler writes what they all hold.
        if ((reader != NOBODY) & (reader != threads) | others_wrote & differs).any():
            raise MemoryFault("shared memory: write to what another thread used, without a barrier between")
        if self.operands[words * size // CHUNK].any():
            raise MemoryFault("shared memory: write to what a matrix product in flight reads")
        state = self.state.reshape(-1, size)[words]
        if (state == IN_FLIGHT).any():
            raise MemoryFault("shared memory: write to bytes still in flight")
        if (state == MBARRIER).any():
            raise MemoryFault("shared memory: write to an mbarrier")

    def read_operand(self, chunks: np.ndarray, thread: int) -> np.ndarray:
        """By the async proxy, the bytes of chunks ``[..., 16]``, which nobody may write until ``release_operand``.

        thread: which one's instruction it is; NOBODY for several threads'.
        """
        if (chunks < self.BASE // CHUNK).any() or (chunks >= len(self.operands)).any():
            raise MemoryFault("shared memory: an operand outside of it")
        state, writer = self.state.reshape(-1, CHUNK)[chunks], self.writer.reshape(-1, CHUNK)[chunks]
        if (state != FENCED).any():
            raise MemoryFault(f"shared memory: a matrix product of bytes {_reason(state)}")
        if ((writer != NOBODY) & (writer != thread)).any():
            raise MemoryFault("shared memory: a matrix product of what another thread wrote, without a barrier between")
        self.operands[chunks] += 1
        return self.bytes.reshape(-1, CHUNK)[chunks]

    def release_operand(self, chunks: np.ndarray, *, ordered: bool) -> None:
        """The matrix product of these chunks was waited for. ordered: by all threads, so they need no barrier."""
        self.operands[chunks] -= 1
        if not ordered:
            self.reader.reshape(-1, CHUNK)[chunks] = SEVERAL

    def initialize_barrier(self, address: int, thread: int) -> None:
        """Make 8 bytes an mbarrier."""
        self.store(np.array([address]), np.ones((1, 8), np.uint8), np.array([thread]), state=MBARRIER)

    def invalidate_barrier(self, address: int, thread: int) -> None:
        """Make an mbarrier's bytes ordinary again."""
        at = slice(address, address + 8)
        if (self.state[at] != MBARRIER).any():
            raise MemoryFault("mbarrier: none at this address")
        self.state[at] = UNWRITTEN
        self.store(np.array([address]), np.zeros((1, 8), np.uint8), np.array([thread]), state=UNWRITTEN)

    def use_barrier(self, address: int, threads: np.ndarray) -> None:
        """Note that threads use an mbarrier."""
        words = self._locate(np.full(len(threads), address), 8)
        if (self.state[address : address + 8] != MBARRIER).any():
            raise MemoryFault("mbarrier: none at this address")
        self._read(words, 8, threads)


def _reason(state: np.ndarray) -> str:
    reasons = {
        MBARRIER: "of an mbarrier",
        IN_FLIGHT: "still in flight",
        UNWRITTEN: "that nobody wrote",
        WRITTEN: "written without fence.proxy.async since",
    }
    return next(text for kind, text in reasons.items() if (state == kind).any())
