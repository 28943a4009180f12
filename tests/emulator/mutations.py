"""Runs of a block without one of the instructions that order accesses."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from tests.emulator.machine import Block, Step
from tests.emulator.memory import MemoryFault
from tests.emulator.ptx import Instruction
from tests.emulator.watch import Watch, again, kind_of

MATRIX = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")


@dataclass
class Row:
    """Of one kind: how many sites were tried, how many removals were reported, and how many sites order nothing.

    needless: sites that order nothing by the rule, whose removal is reported all the same. faults: what was reported.
    """

    tried: int = 0
    caught: int = 0
    idle: int = 0
    needless: int = 0
    faults: set[str] = field(default_factory=set)


@dataclass
class Report:
    """rows: by kind. missed: instructions that order something, and whose removal was not reported."""

    rows: dict[str, Row] = field(default_factory=lambda: defaultdict(Row))
    missed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{kind:24}{r.tried:6}{r.caught:8}{r.idle:6}{r.needless:10}" for kind, r in sorted(self.rows.items())]
        return "\n".join(["kind                     tried  caught  idle  needless", *lines])


def without(instruction: Instruction) -> Step:
    """What the block does instead: nothing. A wait in a loop says that it is over."""
    if not instruction.opcode.startswith("mbarrier.try_wait"):
        return lambda block, active: None
    return lambda block, active: block.write(instruction.operands[0], np.ones(len(active), bool), active)


def mutate(block: Block, code: list[Step], ends: frozenset[int], report: Report, *, one_of_each: bool) -> bool:
    """Try a block's ordering instructions. Returns whether it has a matrix instruction; if not, none is tried.

    one_of_each: only the first instruction of a kind that orders something.
    """
    # Other kernels add atomically to what others read, so they may run once only.
    if not any(instruction.opcode.startswith(MATRIX) for instruction in block.kernel.instructions):
        return False
    watch = Watch(block, code, ends)
    if not any(opcode.startswith(MATRIX) for opcode in watch.block.executed):
        return False
    done: set[str] = set()
    for at in sorted(watch.ran):
        instruction, useful = block.kernel.instructions[at], at in watch.useful
        kind = kind_of(instruction)
        if one_of_each and (kind in done or not useful):
            continue
        done.add(kind)
        row = report.rows[kind]
        row.tried += 1
        row.idle += not useful
        try:
            again(block).run([*code[:at], without(instruction), *code[at + 1 :]], ends)
        except MemoryFault as fault:
            row.caught += 1
            row.needless += not useful
            row.faults.add(str(fault))
        else:
            if useful:
                report.missed.append(f"{at}: {instruction}")
    return True
