"""Generation 10's tensor memory, 128 lanes of 512 words, which refuses what is not ordered.

tcgen05.st and tcgen05.ld are done once tcgen05.wait::st or ::ld has waited for them, a tcgen05.mma once an mbarrier has
that tcgen05.commit arrives at. Until then nothing else may use those words, but for a tcgen05.mma of the same form that
adds to the same sums. What one warp did is ordered with what another does by a barrier between. The registers that
tcgen05.ld writes may be read without a wait, for PTX orders what depends on them. It does not order what overwrites the
words that were read: that is what tcgen05.wait::ld is for.

PTX also describes tcgen05.fence::before_thread_sync and ::after_thread_sync around a barrier between threads. Triton
writes neither: it relies on bar.sync, which orders all accesses of all threads. So does this; it refuses those fences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.emulator.memory import MemoryFault
from tests.emulator.shared_memory import NOBODY, SEVERAL, SharedMemory

# What a word is: STORING until tcgen05.wait::st, PRODUCT until the product that writes it was waited for.
UNWRITTEN, STORING, PRODUCT, WRITTEN = range(4)
Places = tuple[np.ndarray, np.ndarray]


@dataclass
class TensorProduct:
    """A tcgen05.mma in flight: which words it reads and writes, its operand in shared memory, and its form."""

    weights: Places
    sums: Places
    chunks: np.ndarray
    form: int


class TensorMemory:
    """One block's tensor memory, and the products that use it. columns: how many are allocated."""

    SHAPE = (128, 512)

    def __init__(self) -> None:
        self.columns = 0
        self.may_allocate = True
        # Products since the last tcgen05.commit, then those that were committed, with the mbarrier's address.
        self.open: list[TensorProduct] = []
        self.committed: list[tuple[int, list[TensorProduct]]] = []
        self.phases: dict[int, int] = {}  # of mbarriers by address: the parity of the phase they are in

    @property
    def in_flight(self) -> bool:
        """Whether a product was not waited for."""
        return bool(self.open or self.committed)

    def allocate(self, columns: int) -> None:
        """Most kernels have none, so its words are made here."""
        if self.columns or not self.may_allocate:
            raise MemoryFault("tensor memory: tcgen05.alloc again, or behind tcgen05.relinquish_alloc_permit")
        self.columns = columns
        self.words = np.zeros(self.SHAPE, np.uint32)
        self.state = np.full(self.SHAPE, UNWRITTEN, np.uint8)
        self.loading = np.zeros(self.SHAPE, bool)
        self.weights = np.zeros(self.SHAPE, np.uint8)  # how many products in flight read it
        # Which warp used a word since the last barrier.
        self.writer = np.full(self.SHAPE, NOBODY, np.int8)
        self.reader = np.full(self.SHAPE, NOBODY, np.int8)

    def deallocate(self, columns: int, warp: int) -> None:
        """Give all columns back."""
        if columns != self.columns:
            raise MemoryFault(f"tensor memory: tcgen05.dealloc of {columns} of {self.columns} columns")
        at = np.indices((self.SHAPE[0], columns))
        self._check_write((at[0], at[1]), np.array(warp))
        self.columns = 0

    def barrier(self) -> None:
        """Every warp's accesses are ordered before those that follow."""
        if self.columns:
            self.writer[:] = NOBODY
            self.reader[:] = NOBODY

    def _check_read(self, at: Places, warps: np.ndarray) -> None:
        if not self.columns or (at[1] >= self.columns).any():
            raise MemoryFault(f"tensor memory: a column beyond the {self.columns} allocated ones")
        state, writer = self.state[at], self.writer[at]
        for kind, text in (
            (UNWRITTEN, "that nobody wrote"),
            (STORING, "that tcgen05.st writes, without tcgen05.wait::st"),
            (PRODUCT, "that a tcgen05.mma in flight writes"),
        ):
            if (state == kind).any():
                raise MemoryFault(f"tensor memory: use of words {text}")
        if ((writer != NOBODY) & (writer != warps)).any():
            raise MemoryFault("tensor memory: use of what another warp wrote, without a barrier between")

    def _check_write(self, at: Places, warps: np.ndarray) -> None:
        if not self.columns or (at[1] >= self.columns).any():
            raise MemoryFault(f"tensor memory: a column beyond the {self.columns} allocated ones")
        if self.loading[at].any():
            raise MemoryFault("tensor memory: write to what tcgen05.ld reads, without tcgen05.wait::ld")
        if self.weights[at].any():
            raise MemoryFault("tensor memory: write to what a tcgen05.mma in flight reads")
        state = self.state[at]
        if (state == STORING).any():
            raise MemoryFault("tensor memory: write to words that tcgen05.st writes, without tcgen05.wait::st")
        if (state == PRODUCT).any():
            raise MemoryFault("tensor memory: write to words that a tcgen05.mma in flight writes")
        self._check_order(at, warps)

    def _check_order(self, at: Places, warps: np.ndarray) -> None:
        for users in (self.writer[at], self.reader[at]):
            if ((users != NOBODY) & (users != warps)).any():
                raise MemoryFault("tensor memory: write to what another warp used, without a barrier between")

    def store(self, at: Places, values: np.ndarray, warps: np.ndarray) -> None:
        """Begin tcgen05.st. warps: by which of them each word is written."""
        self._check_write(at, warps)
        self.words[at], self.state[at], self.writer[at] = values, STORING, warps

    def load(self, at: Places, warps: np.ndarray) -> np.ndarray:
        """Begin tcgen05.ld."""
        self._check_read(at, warps)
        reader = self.reader[at]
        self.reader[at] = np.where((reader == NOBODY) | (reader == warps), warps, SEVERAL)
        self.loading[at] = True
        return self.words[at]

    def wait_stores(self) -> None:
        """tcgen05.wait::st by all threads."""
        self.state[self.state == STORING] = WRITTEN

    def wait_loads(self) -> None:
        """tcgen05.wait::ld by all threads."""
        self.loading[:] = False

    def begin(self, product: TensorProduct, warp: int, *, add: bool) -> None:
        """Check that a product may begin, and keep others from the words that it uses."""
        warps = np.array(warp)
        self._check_read(product.weights, warps)
        sums = self.state[product.sums]
        before = [p for group in (self.open, *(g for _, g in self.committed)) for p in group]
        if (sums == PRODUCT).any():
            if any(p.form != product.form and _overlap(p.sums, product.sums) for p in before):
                raise MemoryFault("tensor memory: sums of two products in flight whose forms differ")
            self._check_order(product.sums, warps)
        else:
            self._check_write(product.sums, warps)
            if add:
                self._check_read(product.sums, warps)
        self.weights[product.weights] += 1
        self.state[product.sums] = PRODUCT
        self.open.append(product)

    def commit(self, address: int) -> None:
        """The products until now arrive at the mbarrier once they are done."""
        self.committed.append((address, self.open))
        self.open = []

    def wait(self, address: int, parity: int, shared: SharedMemory) -> None:
        """All threads wait for the mbarrier's phase of that parity, as late as can be."""
        while self.phases[address] == parity:
            if not self.committed:
                raise MemoryFault("mbarrier: a wait that nothing ends")
            arrived, products = self.committed.pop(0)
            for product in products:
                self.weights[product.weights] -= 1
                self.state[product.sums] = WRITTEN
                shared.release_operand(product.chunks, ordered=True)
            if arrived not in self.phases:
                raise MemoryFault("mbarrier: tcgen05.commit arrives at one that is no more")
            self.phases[arrived] ^= 1


def _overlap(first: Places, second: Places) -> bool:
    lanes = np.intersect1d(first[0], second[0])
    return bool(len(lanes) and len(np.intersect1d(first[1], second[1])))
