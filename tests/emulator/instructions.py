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
from tests.emulator.tcgen05 import TCGEN05
from tests.emulator.wgmma import WGMMA


def step(instruction: Instruction) -> Step:
    """The step of one instruction, without its guard. Raises NotEmulated, which names it, if it is not known."""
    try:
        for pattern, make in TABLE.items():
            match = re.fullmatch(pattern, instruction.opcode)
            if match:
                return make(match, *instruction.operands)
        return arithmetic(instruction)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        # Too few operands, or one of another form, or a type that there is none of.
        raise NotEmulated(f"the form of {instruction}") from e


def _all_lanes(members: str, name: str) -> None:
    if members not in ("-1", "0xffffffff"):
        raise NotEmulated(f"{name} with the members {members}")


def _shuffle(match: re.Match, target: str, source: str, distance: str, clamp: str, members: str) -> Step:
    mode = match[1]
    _all_lanes(members, match[0])
    if clamp != ("0" if mode == "up" else "31"):
        raise NotEmulated(f"{match[0]} of a part of a warp: {clamp}")
    read, read_distance = operand(source, np.uint32), operand(distance, np.uint32)

    def run(block: Block, active: Value) -> None:
        block.whole_warps(active, match[0])
        value, by = read(block), read_distance(block).astype(np.int64) & 31
        lane = block.threads % WARP
        place = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": by}[mode]
        place = np.where((place >= 0) & (place < WARP), place, lane)
        block.write(target, value[block.threads - lane + place], active)

    return run


def _reduce(match: re.Match, target: str, source: str, members: str) -> Step:
    reduce = {"add": np.add, "max": np.maximum, "min": np.minimum}[match[1]]
    read, read_members = operand(source, TYPES[match[2]]), operand(members, np.uint32)

    def run(block: Block, active: Value) -> None:
        block.whole_warps(active, match[0])
        if (read_members(block)[active] != 0xFFFFFFFF).any():
            raise NotEmulated(f"{match[0]} of a part of a warp")
        value = read(block).reshape(-1, WARP)
        block.write(target, np.repeat(reduce.reduce(value, 1, dtype=value.dtype), WARP), active)

    return run


def _elect(match: re.Match, targets: str, members: str) -> Step:
    """PTX leaves open which lane it is; a GPU takes the first."""
    _all_lanes(members, match[0])
    target, predicate = targets.split("|")

    def run(block: Block, active: Value) -> None:
        block.whole_warps(active, match[0])
        block.write(target, np.zeros(len(active), np.uint32), active)
        block.write(predicate, block.threads % WARP == 0, active)

    return run


WARPS: dict[str, Callable[..., Step]] = {
    r"elect\.sync": _elect,
    r"shfl\.sync\.(bfly|up|down|idx)\.b32": _shuffle,
    r"redux\.sync\.(add|max|min)\.(s32|u32)": _reduce,
}
TABLE: dict[str, Callable[..., Step]] = {**ACCESSES, **WARPS, **MATRIX, **WGMMA, **TCGEN05}
