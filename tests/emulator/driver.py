"""A driver of Triton's whose GPU is emulated: kernels are launched as ever, on tensors on the CPU."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from tests.emulator.instructions import step
from tests.emulator.machine import Block, compile_kernel
from tests.emulator.memory import GlobalMemory, MemoryFault
from tests.emulator.ptx import parse
from tests.emulator.shared_memory import SharedMemory

# Largest shared memory of one program (CUDA programming guide, table of compute capabilities).
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


class Launcher:
    """Runs one compiled kernel, program by program."""

    def __init__(self, driver: Driver, source, metadata) -> None:
        self.driver = driver
        self.signature = [str(kind) for kind in source.signature.values()]
        self.shared, self.early = metadata.shared, metadata.launch_pdl
        ptx = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        self.kernel = parse(Path(ptx).read_text())
        self.code = compile_kernel(self.kernel, step)
        self.executed: Counter = Counter()

    def __call__(self, x: int, y: int, z: int, stream, function, packed, metadata, enter, leave, *arguments) -> None:
        given = [a for a, kind in zip(arguments, self.signature, strict=True) if kind != "constexpr"]
        tensors = [a for a in given if isinstance(a, torch.Tensor)]
        memory = GlobalMemory(tensors, self.driver.written)
        # Behind them, two pointers to scratch memory that no kernel here asks for.
        values = [_bits(a) for a in given] + [np.uint64(0)] * 2
        named = {name: value for (_, name), value in zip(self.kernel.parameters, values, strict=True)}
        for index in itertools.product(range(z), range(y), range(x)):
            memory.early = self.early
            block = Block(self.kernel, index[::-1], (x, y, z), named, memory, SharedMemory(self.shared))
            block.run(*self.code)
            if memory.early:
                raise MemoryFault("the end of a block before griddepcontrol.wait")
            self.executed += block.executed
        self.driver.written = sorted(memory.written)


def _bits(argument: torch.Tensor | float) -> np.generic:
    if isinstance(argument, torch.Tensor):
        return np.uint64(argument.data_ptr())
    if isinstance(argument, float):
        return np.float32(argument).view(np.uint32)
    return np.int32(argument).view(np.uint32)


class Driver:
    """What Triton asks of a driver. sm: compute capability, two digits or three; also the device's number.

    written: first and last address of each tensor that the last kernel wrote.
    """

    def __init__(self, sm: int) -> None:
        self.sm = sm
        self.utils = self
        self.launchers: dict[str, Launcher] = {}
        self.written: list[tuple[int, int]] = []

    def launcher_cls(self, source, metadata) -> Launcher:
        if metadata.hash not in self.launchers:
            self.launchers[metadata.hash] = Launcher(self, source, metadata)
        return self.launchers[metadata.hash]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        return self.sm

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[device]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> Sequence:
        """Module, function, registers, spills and most threads."""
        # Without a module Triton loads the kernel anew for every launch, and unloads nothing.
        return None, None, 0, 0, 1024


@contextmanager
def emulated(sm: int) -> Iterator[Driver]:
    """Launch Triton's kernels on an emulated GPU."""
    before, driver = triton.runtime.driver._active, Driver(sm)
    triton.runtime.driver.set_active(driver)
    try:
        yield driver
    finally:
        triton.runtime.driver._active = before
