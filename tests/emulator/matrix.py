"""Matrix instructions: which lane holds which element of an operand, and where operands lie in shared memory.

The model of sums: products of 16-bit floats are exact in float32. The 16 products of an instruction are added in
float32 as a tree, k to k + 8 first, and their sum is added to the accumulator. Each addition rounds to nearest. PTX
leaves order and rounding open: a real tensor core aligns the products with the accumulator and cuts off lower bits. So
results agree with a GPU's to float32's precision only, never to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.emulator.machine import Block, NotEmulated, Step, Value, split_vector


def floats(bits: Value, kind: str) -> Value:
    """16-bit patterns as float32."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def multiply(a: Value, b: Value, sums: Value | None = None) -> Value:
    """``[..., m, n]`` float32 of ``a [..., m, 16]``, ``b [..., n, 16]``, and what they are added to, if anything."""
    with np.errstate(all="ignore"):
        products = a[..., :, None, :] * b[..., None, :, :]
        for half in (8, 4, 2, 1):
            products = products[..., :half] + products[..., half:]
        return products[..., 0] if sums is None else products[..., 0] + sums


def halves(words: list[Value], kind: str) -> Value:
    """Registers of two 16-bit floats each: ``[threads, registers, 2]``."""
    words = np.stack(words, 1)
    return floats(words.view(np.uint16).reshape(*words.shape, 2), kind)


def _lanes(values: Value) -> Value:
    """``[threads, ...]`` to ``[warps, 8, 4, ...]``: a lane t is (t // 4, t % 4)."""
    return values.reshape(-1, 8, 4, *values.shape[1:])


def first_operand(words: list[Value], kind: str) -> Value:
    """``[warps, 16, 16]`` (m, k) from four registers: of a lane, register 2 * (k // 8) + m // 8 has m % 8 = t // 4."""
    parts = _lanes(halves(words, kind)).reshape(-1, 8, 4, 2, 2, 2)
    # warp, m % 8, k % 8 // 2, k // 8, m // 8, k % 2
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)


def _second_operand(words: list[Value], kind: str) -> Value:
    """``[warps, 8, 16]`` (n, k) from two registers: of a lane, register k // 8 has n = t // 4."""
    # warp, n, k % 8 // 2, k // 8, k % 2
    return _lanes(halves(words, kind)).transpose(0, 1, 3, 2, 4).reshape(-1, 8, 16)


def accumulator(words: list[Value]) -> Value:
    """``[warps, 16, n]`` from n / 2 registers: of a lane, each four are rows t // 4 and 8 more, two columns each."""
    parts = _lanes(np.stack(words, 1).view(np.float32)).reshape(-1, 8, 4, len(words) // 4, 2, 2)
    # warp, m % 8, n % 8 // 2, n // 8, m // 8, n % 2
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 2 * len(words))


def accumulator_words(result: Value) -> list[Value]:
    """The other way round: what each register gets."""
    parts = result.reshape(-1, 2, 8, result.shape[-1] // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5)
    values = parts.reshape(-1, result.shape[-1] // 2).view(np.uint32)
    return [np.ascontiguousarray(values[:, i]) for i in range(values.shape[1])]


def _mma(match: re.Match, target: str, first: str, second: str, third: str) -> Step:
    kind = match[1]
    names = [split_vector(text) for text in (first, second, third, target)]

    def run(block: Block, active: Value) -> None:
        block.whole_warps(active, match[0])
        first, second, third = ([block.read(name, np.uint32) for name in group] for group in names[:3])
        result = multiply(first_operand(first, kind), _second_operand(second, kind), accumulator(third))
        for name, word in zip(names[3], accumulator_words(result), strict=True):
            block.write(name, word, active)

    return run


def chunks_of_matrix(descriptor: int, rows: int) -> Value:
    """Which 16 bytes of shared memory hold ``[rows, 16]`` 16-bit floats, two for each row, by a descriptor.

    Of the descriptor: bits 0 to 13 are the address, 32 to 45 the distance of one eight rows from the next, both in 16
    bytes; the last two are the swizzle, by which bits 4 to 6 of an address are combined with bits 7 to 9 (128 bytes),
    the last two of them (64) or the last one (32).
    """
    start, stride = descriptor & 0x3FFF, descriptor >> 32 & 0x3FFF
    swizzle = {1: (8, 7), 2: (4, 3), 3: (2, 1)}.get(descriptor >> 62)
    # Bits 46 to 48 are 1 on generation 10 and 0 before; bits 49 to 51 move the swizzle.
    if swizzle is None or descriptor >> 49 & 0x1FFF or descriptor >> 14 & 3 or descriptor >> 30 & 3:
        raise NotEmulated(f"the layout of a matrix in shared memory: {descriptor:#x}")
    chunks_per_row, mask = swizzle
    row = np.arange(rows)[:, None]
    chunk = start + row // 8 * stride + row % 8 * chunks_per_row + np.arange(2)
    return chunk ^ (chunk >> 3) & mask


MATRIX: dict[str, Callable[..., Step]] = {
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(f16|bf16)\.\1\.f32": _mma,
}
