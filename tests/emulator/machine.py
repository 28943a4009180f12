"""One block of threads at a time: registers, control flow, barriers, and copies in flight."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.emulator.memory import WARP, GlobalMemory, MemoryFault
from tests.emulator.ptx import Instruction, Kernel
from tests.emulator.shared_memory import SharedMemory
from tests.emulator.tensor_memory import TensorMemory

Value = np.ndarray
BRANCHES = ("bra", "bra.uni", "brx.idx")
ENDS = ("ret", "exit")
# By how opcodes begin: those that use ``Block.gather``.
GATHERING = ("mbarrier.try_wait", "cp.async.commit", "cp.async.wait", "fence.", "wgmma.", "tcgen05.wait")
TENSOR_LOAD = "tcgen05.ld"
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
# What a type of PTX's is read as.
TYPES = {
    **{f"u{n}": dtype for n, dtype in UNSIGNED.items()},
    **{f"b{n}": dtype for n, dtype in UNSIGNED.items()},
    **{f"s{n}": np.dtype(f"i{n // 8}").type for n in UNSIGNED},
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "bf16": np.uint16,
    "pred": bool,
}
WIDER = {np.int16: np.int32, np.uint16: np.uint32, np.int32: np.int64, np.uint32: np.uint64}


class NotEmulated(Exception):
    """An instruction, or a form of one, that the emulator does not know."""


@dataclass
class Copy:
    """A copy to shared memory that was begun: ``values [threads, size]`` uint8."""

    addresses: np.ndarray
    values: np.ndarray
    threads: np.ndarray


@dataclass
class Product:
    """A wgmma in flight: the registers that it uses and the chunks of shared memory that it reads."""

    registers: tuple[str, ...]
    chunks: np.ndarray


@dataclass
class Block:
    """A block of threads and what it holds. Registers are arrays with one value a thread; a write makes a new array."""

    kernel: Kernel
    index: tuple[int, int, int]
    grid: tuple[int, int, int]
    arguments: dict[str, np.ndarray]
    global_memory: GlobalMemory
    shared: SharedMemory
    registers: dict[str, Value] = field(default_factory=dict)
    copies: list[list[Copy]] = field(default_factory=lambda: [[]])
    products: list[list[Product]] = field(default_factory=lambda: [[]])
    # Registers that an instruction in flight writes or reads, and which instruction.
    in_flight: dict[str, str] = field(default_factory=dict)
    # Of wgmma's registers, those that other instructions used since wgmma.fence. None: there was no fence yet.
    touched: set[str] | None = None
    tensor_memory: TensorMemory = field(default_factory=TensorMemory)
    executed: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.threads = np.arange(self.kernel.num_threads)
        self.program_counters = np.zeros(self.kernel.num_threads, np.int64)
        self.waiting = np.zeros(self.kernel.num_threads, bool)
        self.parked = np.zeros(self.kernel.num_threads, bool)

    def run(self, code: Sequence[Step], ends: frozenset[int]) -> None:
        """Run to the end. code: one step per instruction. ends: where threads may part or meet again.

        Of threads that have parted, those furthest behind go on, as they would meet again that way.
        """
        end = len(code)
        while True:
            ready = ~self.waiting & ~self.parked & (self.program_counters < end)
            if not ready.any():
                if self.parked.all():
                    self.parked[:] = False
                    continue
                if self.parked.any():
                    raise NotEmulated(
                        "a part of the threads at an instruction that is emulated for all threads at once"
                    )
                if not self.waiting.any():
                    return self._check_end()
                if not self.waiting.all():
                    raise MemoryFault("barrier: some threads have ended, others wait")
                self.waiting[:] = False
                self.shared.barrier()
                self.tensor_memory.barrier()
                continue
            at = int(self.program_counters[ready].min())
            active = ready & (self.program_counters == at)
            warps = int(active.reshape(-1, WARP).any(1).sum())
            while True:
                self.executed[self.kernel.instructions[at].opcode] += warps
                self.program_counters[active] = at + 1
                code[at](self, active)
                at += 1
                if at in ends:
                    break

    def _check_end(self) -> None:
        if any(self.products) or self.tensor_memory.in_flight:
            raise MemoryFault("the end of a block with a matrix product in flight")
        if self.tensor_memory.columns:
            raise MemoryFault("the end of a block before tcgen05.dealloc")

    def touch(self, name: str, *, read: bool) -> None:
        """Note that an instruction uses a register that asynchronous instructions use too."""
        by = self.in_flight.get(name)
        if by == TENSOR_LOAD and read:
            # PTX: what depends on the register is ordered behind tcgen05.ld without a wait.
            del self.in_flight[name]
        elif by is not None:
            raise MemoryFault(f"{name}: used before the {by} that uses it was waited for")
        if self.touched is not None:
            self.touched.add(name)

    def read(self, name: str, dtype: type, *, undefined: bool = False) -> Value:
        """A register as values of a type; of a narrower type, its low bits.

        undefined: that it was never written is no fault, for the compiler packs such with others; then something odd.
        """
        value = self.registers.get(name)
        if value is None and undefined:
            return np.full(len(self.threads), 0xA5A5A5A5A5A5A5A5 >> 64 - 8 * np.dtype(dtype).itemsize, dtype)
        if value is None:
            raise MemoryFault(f"{name}: read before it was written")
        if name in self.kernel.asynchronous:
            self.touch(name, read=True)
        if dtype is bool or value.dtype.itemsize == np.dtype(dtype).itemsize:
            return value.view(dtype)
        return value.astype(UNSIGNED[8 * np.dtype(dtype).itemsize]).view(dtype)

    def write(self, name: str, value: Value, active: Value) -> None:
        """Write the active threads' values, whose type has the register's size or is an integer's that is extended."""
        if name in self.kernel.asynchronous:
            self.touch(name, read=False)
        bits = self.kernel.registers[name]
        if bits == 1:
            value = value.astype(bool)
        elif value.dtype.itemsize * 8 == bits:
            value = value.view(UNSIGNED[bits])
        else:
            value = value.astype(np.dtype(f"{value.dtype.kind}{bits // 8}")).view(UNSIGNED[bits])
        if not active.all():
            old = self.registers.get(name)
            value = np.where(active, value, np.zeros_like(value) if old is None else old)
        self.registers[name] = value

    def whole_warps(self, active: Value, name: str) -> None:
        """Refuse what a part of a warp does: PTX leaves ``.aligned`` undefined there."""
        warps = active.reshape(-1, WARP)
        if not (warps.all(1) | ~warps.any(1)).all():
            raise MemoryFault(f"{name} by a part of a warp")

    def gather(self, active: Value) -> bool:
        """Let an instruction that is emulated for all threads at once wait for the last. Returns whether it has come.

        It orders nothing: it is one of the ways in which threads may happen to run.
        """
        if not active.all():
            self.parked |= active
            self.program_counters[active] -= 1
        return bool(active.all())

    def start_copy(self, copy: Copy) -> None:
        """Begin to write shared memory; nobody may touch those bytes until ``wait_copies``."""
        self.shared.start_copy(copy.addresses, copy.values.shape[1], copy.threads)
        self.copies[-1].append(copy)

    def wait_copies(self, pending: int) -> None:
        """Finish the groups of copies but for the last ``pending`` ones that were committed."""
        finished, self.copies = self.copies[: -1 - pending], self.copies[-1 - pending :]
        for group in finished:
            for copy in group:
                self.shared.finish_copy(copy.addresses, copy.values, copy.threads)


# What one instruction does to a block, for the threads that are active.
Step = Callable[[Block, Value], None]


SPECIALS: dict[str, Callable[[Block], Value]] = {
    "%tid.x": lambda b: b.threads,
    "%ntid.x": lambda b: np.full(len(b.threads), len(b.threads)),
    **{f"%ctaid.{axis}": lambda b, i=i: np.full(len(b.threads), b.index[i]) for i, axis in enumerate("xyz")},
    **{f"%nctaid.{axis}": lambda b, i=i: np.full(len(b.threads), b.grid[i]) for i, axis in enumerate("xyz")},
}


def operand(text: str, dtype: type, *, undefined: bool = False) -> Callable[[Block], Value]:
    """What reads an operand: a register, a special register, a constant, or the start of shared memory."""
    special = SPECIALS.get(text)
    if special is not None:
        return lambda b: special(b).astype(dtype)
    if text == "global_smem":
        return lambda b: np.full(len(b.threads), SharedMemory.BASE, dtype)
    if text[0].isalpha() or text[0] == "%":
        return lambda b: b.read(text, dtype, undefined=undefined)
    constant = _constant(text, dtype)
    return lambda b: np.full(len(b.threads), constant)


def _constant(text: str, dtype: type) -> np.generic:
    kind = np.dtype(dtype)
    if text[:2].lower() == "0f":
        return np.array(int(text[2:], 16), np.uint32).view(dtype if kind.itemsize == 4 else np.float32)[()]
    number = int(text.rstrip("U"), 0)
    if kind.kind == "b":
        return np.bool_(number != 0)
    if kind.kind == "f":
        return np.dtype(dtype).type(number)
    return np.array(number % (1 << 8 * kind.itemsize), UNSIGNED[8 * kind.itemsize]).view(dtype)[()]


def address_of(text: str, dtype: type) -> Callable[[Block], Value]:
    """What reads ``[register + offset]`` as an address, int64."""
    base, offset = re.fullmatch(r"\[\s*([%\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text).groups()
    read, distance = operand(base, dtype), int(offset or "0", 0)
    return lambda block: read(block).astype(np.int64) + distance


def split_vector(text: str) -> list[str]:
    """``{a, b}`` to a and b; anything else to itself."""
    return [part.strip() for part in text.strip("{} ").split(",")]


def compile_kernel(kernel: Kernel, step: Callable[[Instruction], Step]) -> tuple[list[Step], frozenset[int]]:
    """What ``Block.run`` takes. step: makes the step of one instruction, without its guard."""

    def targets(instruction: Instruction) -> list[int]:
        *_, label = instruction.operands
        return [kernel.labels[name] for name in kernel.tables.get(label, [label])]

    def branch(instruction: Instruction) -> Step:
        places = np.array(targets(instruction))
        index = operand(instruction.operands[0] if len(instruction.operands) > 1 else "0", np.uint32)

        def jump(block: Block, active: Value) -> None:
            block.program_counters[active] = places[index(block)[active]]

        return jump

    def end(block: Block, active: Value) -> None:
        block.program_counters[active] = len(kernel.instructions)

    def guarded(instruction: Instruction) -> Step:
        opcode = instruction.opcode
        run = branch(instruction) if opcode in BRANCHES else end if opcode in ENDS else step(instruction)
        if not instruction.guard:
            return run
        negated, predicate = instruction.guard[0] == "!", instruction.guard.lstrip("!")

        def run_if(block: Block, active: Value) -> None:
            chosen = active & (block.read(predicate, bool) ^ negated)
            if chosen.any():
                run(block, chosen)

        return run_if

    for instruction in kernel.instructions:
        if instruction.opcode.startswith("wgmma.mma_async"):
            kernel.asynchronous.update(*map(split_vector, instruction.operands[:2]))
        elif instruction.opcode.startswith(TENSOR_LOAD):
            kernel.asynchronous.update(split_vector(instruction.operands[0]))
    code = [guarded(instruction) for instruction in kernel.instructions]
    stops = (*BRANCHES, *ENDS, "bar.sync", "barrier.sync", *GATHERING)
    ends = {i + 1 for i, instruction in enumerate(kernel.instructions) if instruction.opcode.startswith(stops)}
    for instruction in kernel.instructions:
        if instruction.opcode in BRANCHES:
            ends.update(targets(instruction))
    return code, frozenset(ends | {len(code)})
