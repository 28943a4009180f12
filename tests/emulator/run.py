"""Runs a few lines of PTX on the emulator."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.emulator.instructions import step
from tests.emulator.machine import Block, compile_kernel
from tests.emulator.memory import GlobalMemory
from tests.emulator.ptx import parse
from tests.emulator.shared_memory import SharedMemory

COVERED: set[str] = set()


def covers(*opcodes: str) -> Callable:
    """Note that a test is one of these instructions."""
    COVERED.update(opcodes)
    return lambda test: test


def run(
    body: str,
    registers: dict[str, np.ndarray] | None = None,
    *,
    threads: int = 32,
    tensors=(),
    arguments: dict[str, np.generic] | None = None,
    early: bool = False,
) -> Block:
    """A block after the body has run. registers: by name, what each thread holds before.

    early: the kernel ahead has not ended.
    Of a name, the first letters tell how many bits a register has: %p 1, %h 16, %r 32 and %d 64.
    """
    bits = {"p": "pred", "h": "b16", "r": "b32", "d": "b64"}
    names = sorted(set(re.findall(r"%[phrd]\d+", body)) | set(registers or {}))
    declared = "\n".join(f".reg .{bits[name[1]]} {name};" for name in names)
    kernel = parse(f".visible .entry kernel() .reqntid {threads} {{\n{declared}\n{body}\nret;\n}}")
    block = Block(kernel, (2, 3, 4), (5, 6, 7), arguments or {}, GlobalMemory(tensors), SharedMemory(16384))
    block.global_memory.early = early
    everyone = np.ones(threads, bool)
    code = compile_kernel(kernel, step)
    for name, values in (registers or {}).items():
        values = np.broadcast_to(values, threads)
        block.write(name, np.ascontiguousarray(values), everyone)
    block.run(*code)
    return block
