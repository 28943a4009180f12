"""What each instruction does, by the PTX instruction set's description; what is not here raises NotEmulated."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.emulator.accesses import ACCESSES
from tests.emulator.arithmetic import arithmetic
from tests.emulator.machine import TYPES, Block, NotEmulated, Step, Value, operand
from tests.emulator.matrix import MATRIX
from tests.emulator.memory import WARP
from tests.emulator.ptx import Instruction
from tests.emulator.tensor_memory import TENSOR_MEMORY


def step(instruction: Instruction) -> Step:
    """The step of one instruction, without its guard."""
    for table in (ACCESSES, WARPS, MATRIX, TENSOR_MEMORY):
        for pattern, make in table.items():
            match = re.fullmatch(pattern, instruction.opcode)
            if match:
                return make(match, *instruction.operands)
    return arithmetic(instruction)


def _shuffle(match: re.Match, target: str, source: str, distance: str, clamp: str, members: str) -> Step:
    mode = match[1]
    read, read_distance = operand(source, np.uint32), operand(distance, np.uint32)

    def run(block: Block, active: Value) -> None:
        value, by = read(block), read_distance(block).astype(np.int64)
        lane = block.threads % WARP
        place = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": by}[mode]
        place = np.where((place >= 0) & (place < WARP), place, lane)
        sources = block.threads - lane + place
        if not active[sources[active]].all():
            raise NotEmulated("shfl.sync from a thread that is elsewhere")
        block.write(target, value[sources], active)

    return run


def _reduce(match: re.Match, target: str, source: str, members: str) -> Step:
    reduce = {"add": np.add, "max": np.maximum, "min": np.minimum}[match[1]]
    read = operand(source, TYPES[match[2]])

    def run(block: Block, active: Value) -> None:
        if not (active.reshape(-1, WARP).all(1) | ~active.reshape(-1, WARP).any(1)).all():
            raise NotEmulated("redux.sync of a part of a warp")
        value = read(block).reshape(-1, WARP)
        block.write(target, np.repeat(reduce.reduce(value, 1, dtype=value.dtype), WARP), active)

    return run


def _elect(match: re.Match, targets: str, members: str) -> Step:
    predicate = targets.split("|")[1]
    return lambda block, active: block.write(predicate, block.threads % WARP == 0, active)


WARPS: dict[str, Callable[..., Step]] = {
    r"elect\.sync": _elect,
    r"shfl\.sync\.(\w+)\.b32": _shuffle,
    r"redux\.sync\.(\w+)\.(\w+)": _reduce,
}
