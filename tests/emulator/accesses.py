"""Loads, stores, atomics, copies in flight, and barriers."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.emulator.machine import TYPES, Block, Copy, NotEmulated, Step, Value, address_of, operand, split_vector
from tests.emulator.memory import WARP, MemoryFault


def _load_parameter(match: re.Match, target: str, source: str) -> Step:
    name = source.strip("[]")

    def run(block: Block, active: Value) -> None:
        block.write(target, np.full(len(block.threads), block.arguments[name]), active)

    return run


def _load(match: re.Match, target: str, source: str) -> Step:
    space, count, kind = match.groups()
    targets, dtype = split_vector(target), np.dtype(TYPES[kind])
    address = address_of(source, np.uint64 if space == "global" else np.uint32)
    size = dtype.itemsize * int(count or 1)

    def run(block: Block, active: Value) -> None:
        at = address(block)[active]
        if space == "global":
            data = block.global_memory.load(at, size)
        else:
            data = block.shared.load(at, size, block.threads[active])
        values = np.zeros((len(active), len(targets)), dtype)
        values[active] = np.ascontiguousarray(data).view(dtype)
        for i, name in enumerate(targets):
            block.write(name, np.ascontiguousarray(values[:, i]), active)

    return run


def _store(match: re.Match, target: str, source: str) -> Step:
    space, _, kind = match.groups()
    reads = [operand(text, TYPES[kind]) for text in split_vector(source)]
    address = address_of(target, np.uint64 if space == "global" else np.uint32)

    def run(block: Block, active: Value) -> None:
        values = np.ascontiguousarray(np.stack([read(block)[active] for read in reads], 1)).view(np.uint8)
        at = address(block)[active]
        if space == "global":
            block.global_memory.store(at, values)
        else:
            block.shared.store(at, values, block.threads[active])

    return run


def _atomic_add(match: re.Match, target: str, place: str, source: str) -> Step:
    dtype = TYPES[match[1]]
    address, read = address_of(place, np.uint64), operand(source, dtype)

    def run(block: Block, active: Value) -> None:
        old = np.zeros(len(active), dtype)
        values, at = read(block), address(block)
        for thread in np.flatnonzero(active):
            here = at[thread : thread + 1]
            old[thread] = block.global_memory.load(here, old.itemsize).view(dtype)[0, 0]
            block.global_memory.store(here, (old[thread : thread + 1] + values[thread]).view(np.uint8)[None])
        block.write(target, old, active)

    return run


def _copy(match: re.Match, target: str, source: str, size: str, used: str | None = None) -> Step:
    whole = int(size, 0)
    if whole not in (4, 8, 16) or (match[1] == "g" and whole != 16):
        raise NotEmulated(f"{match[0]} of {size} bytes")
    to, source_address = address_of(target, np.uint32), address_of(source, np.uint64)
    read_used = operand(used or size, np.uint32)

    def run(block: Block, active: Value) -> None:
        values = np.zeros((len(active), whole), np.uint8)
        used_bytes = read_used(block)
        if not np.isin(used_bytes[active], (0, whole)).all():
            raise NotEmulated("cp.async of a part")
        taken = active & (used_bytes == whole)
        values[taken] = block.global_memory.load(source_address(block)[taken], whole)
        block.start_copy(Copy(to(block)[active], values[active], block.threads[active]))

    return run


def _commit_copies(match: re.Match) -> Step:
    def run(block: Block, active: Value) -> None:
        if not block.gather(active):
            return
        block.copies.append([])

    return run


def _wait_copies(match: re.Match, pending: str) -> Step:
    def run(block: Block, active: Value) -> None:
        if not block.gather(active):
            return
        block.wait_copies(int(pending))

    return run


def _barrier(match: re.Match, number: str, *threads: str) -> Step:
    """The barrier of the whole block; those of a part of it have another number, or a number of threads."""
    if number != "0" or threads:
        raise NotEmulated(f"{match[0]} {', '.join((number, *threads))}")

    def run(block: Block, active: Value) -> None:
        if match[1] == "bar":
            block.whole_warps(active, match[0])
        block.waiting |= active

    return run


def _fence_proxy(match: re.Match) -> Step:
    def run(block: Block, active: Value) -> None:
        if not block.gather(active):
            return
        block.shared.fence_proxy()

    return run


def _prefetch(match: re.Match, source: str) -> Step:
    address = address_of(source, np.uint64)
    return lambda block, active: block.global_memory.check(address(block)[active])


def _wait_for_previous_kernel(match: re.Match) -> Step:
    def run(block: Block, active: Value) -> None:
        block.global_memory.early = False

    return run


def _launch_dependents(match: re.Match) -> Step:
    def run(block: Block, active: Value) -> None:
        if block.global_memory.early:
            raise MemoryFault("griddepcontrol.launch_dependents before griddepcontrol.wait")

    return run


def _rows(block: Block, at: Value, count: int, active: Value) -> tuple[Value, Value]:
    """Of ldmatrix and stmatrix, the addresses ``[warps * count * 8]`` of the matrices' rows, and who gives them."""
    block.whole_warps(active, "ldmatrix or stmatrix")
    givers = block.threads[active].reshape(-1, WARP)[:, : 8 * count].reshape(-1)
    return at[givers], givers


def _load_matrices(match: re.Match, target: str, source: str) -> Step:
    names, transposed = split_vector(target), bool(match[2])
    address = address_of(source, np.uint32)

    def run(block: Block, active: Value) -> None:
        at, givers = _rows(block, address(block), len(names), active)
        rows = np.ascontiguousarray(block.shared.load(at, 16, givers)).view(np.uint16).reshape(-1, len(names), 8, 8)
        rows = rows.transpose(0, 1, 3, 2) if transposed else rows
        # warp, matrix, lane, half
        words = np.ascontiguousarray(rows).reshape(-1, len(names), WARP, 2).view(np.uint32)[..., 0]
        for i, name in enumerate(names):
            value = np.zeros(len(active), np.uint32)
            value[active] = words[:, i].reshape(-1)
            block.write(name, value, active)

    return run


def _store_matrices(match: re.Match, target: str, source: str) -> Step:
    names, transposed = split_vector(source), bool(match[2])
    address = address_of(target, np.uint32)

    def run(block: Block, active: Value) -> None:
        at, givers = _rows(block, address(block), len(names), active)
        words = np.stack([block.read(name, np.uint32)[active].reshape(-1, WARP) for name in names], 1)
        # Of each warp and matrix, four lanes hold a row of 16 bytes.
        rows = words.view(np.uint16).reshape(-1, len(names), 8, 8)
        rows = rows.transpose(0, 1, 3, 2) if transposed else rows
        block.shared.store(at, np.ascontiguousarray(rows).view(np.uint8).reshape(-1, 16), givers)

    return run


ACCESSES: dict[str, Callable[..., Step]] = {
    r"ldmatrix\.sync\.aligned\.m8n8\.x(\d)(\.trans)?\.shared\.b16": _load_matrices,
    r"stmatrix\.sync\.aligned\.m8n8\.x(\d)(\.trans)?\.shared\.b16": _store_matrices,
    r"ld\.param\.\w+": _load_parameter,
    r"ld\.(?:volatile\.)?(global|shared)(?:::cta)?(?:\.v(\d))?\.(\w+)": _load,
    r"st\.(global|shared)(?:::cta)?(?:\.v(\d))?\.(\w+)": _store,
    r"atom\.global\.gpu\.\w+\.add\.(\w+)": _atomic_add,
    r"cp\.async\.c([ag])\.shared\.global": _copy,
    r"cp\.async\.commit_group": _commit_copies,
    r"cp\.async\.wait_group": _wait_copies,
    r"(bar|barrier)\.sync": _barrier,
    r"griddepcontrol\.wait": _wait_for_previous_kernel,
    r"griddepcontrol\.launch_dependents": _launch_dependents,
    r"prefetch\.global\.L2": _prefetch,
    r"fence\.proxy\.async\.shared::cta": _fence_proxy,
}
