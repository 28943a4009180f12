"""Matrix instructions: which lane holds which element of an operand, and where operands lie in shared memory.

Sums are rounded to float32 once per instruction; a GPU rounds oftener, so results agree to its precision only.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.emulator.machine import Block, NotEmulated, Product, Step, Value, operand, split_vector

WARPGROUP = 128


def floats(bits: Value, kind: str) -> Value:
    """16-bit patterns as float64."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def _halves(block: Block, names: list[str], kind: str) -> Value:
    """Registers of two 16-bit floats each: ``[threads, registers, 2]``."""
    words = np.stack([block.read(name, np.uint32) for name in names], 1)
    return floats(words.view(np.uint16).reshape(len(words), len(names), 2), kind)


def _lanes(values: Value) -> Value:
    """``[threads, ...]`` to ``[warps, 8, 4, ...]``: a lane t is (t // 4, t % 4)."""
    return values.reshape(-1, 8, 4, *values.shape[1:])


def _first_operand(block: Block, names: list[str], kind: str) -> Value:
    """``[warps, 16, 16]`` (m, k) from four registers: of a lane, register 2 * (k // 8) + m // 8 has m % 8 = t // 4."""
    parts = _lanes(_halves(block, names, kind)).reshape(-1, 8, 4, 2, 2, 2)
    # warp, m % 8, k % 8 // 2, k // 8, m // 8, k % 2
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)


def _second_operand(block: Block, names: list[str], kind: str) -> Value:
    """``[warps, 16, 8]`` (k, n) from two registers: of a lane, register k // 8 has n = t // 4."""
    parts = _lanes(_halves(block, names, kind))
    # warp, n, k % 8 // 2, k // 8, k % 2
    return parts.transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)


def _accumulator(block: Block, names: list[str]) -> Value:
    """``[warps, 16, n]`` from n / 2 registers: of a lane, each four are rows t // 4 and 8 more, two columns each."""
    values = np.stack([block.read(name, np.float32) for name in names], 1)
    parts = _lanes(values).reshape(-1, 8, 4, len(names) // 4, 2, 2)
    # warp, m % 8, n % 8 // 2, n // 8, m // 8, n % 2
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 2 * len(names))


def _write_accumulator(block: Block, names: list[str], result: Value, active: Value) -> None:
    parts = result.reshape(-1, 2, 8, len(names) // 4, 4, 2).transpose(0, 2, 4, 3, 1, 5)
    values = parts.reshape(-1, len(names)).astype(np.float32)
    for i, name in enumerate(names):
        block.write(name, np.ascontiguousarray(values[:, i]), active)


def _mma(match: re.Match, target: str, first: str, second: str, third: str) -> Step:
    kind = match[1]
    names = [split_vector(text) for text in (first, second, third, target)]

    def run(block: Block, active: Value) -> None:
        product = _first_operand(block, names[0], kind) @ _second_operand(block, names[1], kind)
        _write_accumulator(block, names[3], product + _accumulator(block, names[2]), active)

    return run


def matrix_in_shared_memory(block: Block, descriptor: int, rows: int) -> Value:
    """Bits of ``[rows, 16]`` 16-bit floats whose columns are neighbours in memory, by a descriptor.

    Of the descriptor: bits 0 to 13 are the address, 32 to 45 the distance of one eight rows from the next, both in 16
    bytes; the last two are the swizzle, by which bits 4 to 6 of an address are combined with bits 7 to 9 (128 bytes),
    the last two of them (64) or the last one (32).
    """
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    swizzle = {1: (128, 0x70), 2: (64, 0x30), 3: (32, 0x10)}.get(descriptor >> 62)
    if swizzle is None or descriptor >> 49 & 7:
        raise NotEmulated(f"the layout of a matrix in shared memory: {descriptor:#x}")
    row_bytes, mask = swizzle
    row, column = np.arange(rows)[:, None], np.arange(16)[None, :]
    address = start + row // 8 * stride + row % 8 * row_bytes + column * 2
    address ^= (address >> 3) & mask
    places = address[..., None] + np.arange(2)
    for warp in range(len(block.threads) // 32):
        block.shared.read(places, np.uint32(1 << warp))
    return np.ascontiguousarray(block.shared.bytes[places]).view(np.uint16)[..., 0]


def _wgmma(match: re.Match, target: str, first: str, second: str, keep: str, *signs: str) -> Step:
    columns, kind = int(match[1]), match[2]
    names, first_names = split_vector(target), split_vector(first)
    if signs != ("1", "1", "0"):
        raise NotEmulated(f"wgmma with {signs}")
    descriptor, kept = operand(second, np.uint64), operand(keep, bool)

    def run(block: Block, active: Value) -> None:
        places, keeps = np.unique(descriptor(block)), np.unique(kept(block))
        if len(block.threads) % WARPGROUP or not active.all() or len(places) > 1 or len(keeps) > 1:
            raise NotEmulated("wgmma of other than all warpgroups, by one matrix")
        weights = _first_operand(block, first_names, kind)
        place, add = int(places[0]), bool(keeps[0])

        def compute(block: Block) -> None:
            values = floats(matrix_in_shared_memory(block, place, columns), kind).T
            result = weights @ values
            _write_accumulator(block, names, result + _accumulator(block, names) if add else result, active)

        block.products[-1].append(Product(compute, tuple(names)))

    return run


def _commit(match: re.Match) -> Step:
    return lambda block, active: block.products.append([])


def _wait(match: re.Match, pending: str) -> Step:
    return lambda block, active: block.wait_products(int(pending))


def _fence(match: re.Match) -> Step:
    return lambda block, active: None


MATRIX: dict[str, Callable[..., Step]] = {
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(\w+)\.\1\.f32": _mma,
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(\w+)\.\2": _wgmma,
    r"wgmma\.commit_group\.sync\.aligned": _commit,
    r"wgmma\.wait_group\.sync\.aligned": _wait,
    r"wgmma\.fence\.sync\.aligned": _fence,
}
