"""Arithmetic, comparison, conversion and moves: what each thread does by itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.emulator.machine import TYPES, UNSIGNED, WIDER, Block, NotEmulated, Step, Value, operand, split_vector
from tests.emulator.matrix import floats
from tests.emulator.ptx import Instruction


def arithmetic(instruction: Instruction) -> Step:
    """The step of one instruction. Raises NotEmulated if it is none of these."""
    name, *modifiers = instruction.opcode.split(".")
    if name == "mov":
        return _move(modifiers[0], *instruction.operands)
    if name == "cvt":
        return _convert(modifiers, *instruction.operands)
    if name == "setp":
        return _compare(modifiers, *instruction.operands)
    if name == "selp":
        return _arithmetic(lambda a, b, p: np.where(p, a, b), [TYPES[modifiers[0]]] * 2 + [bool], instruction)
    dtype = TYPES.get(modifiers[-1]) if modifiers else None
    flags = set(modifiers[:-1]) - {"ftz", "rn", "approx", "full", "lo"}
    if modifiers[-2:] in (["f32", "bf16"], ["f32", "f16"]) and name in ("add", "sub", "fma"):
        return _mixed(ARITHMETIC[(name,)][0], modifiers[-1], instruction)
    if instruction.opcode in ("fma.rn.bf16x2", "fma.rn.f16x2"):
        return _fma_pairs(modifiers[-1].removesuffix("x2"), *instruction.operands)
    if modifiers and modifiers[-1] == "f32x2":
        return _paired(ARITHMETIC[(name, *flags)][0], instruction)
    if dtype is not None and (name, *flags) in ARITHMETIC:
        compute, kinds = ARITHMETIC[(name, *flags)]
        return _arithmetic(compute, [dtype if kind is None else kind(dtype) for kind in kinds], instruction)
    raise NotEmulated(str(instruction))


def _arithmetic(compute: Callable[..., Value], types: list[type], instruction: Instruction) -> Step:
    target, *sources = instruction.operands
    reads = [operand(text, dtype) for text, dtype in zip(sources, types, strict=True)]

    def run(block: Block, active: Value) -> None:
        with np.errstate(all="ignore"):
            block.write(target, compute(*(read(block) for read in reads)), active)

    return run


def _mixed(compute: Callable[..., Value], kind: str, instruction: Instruction) -> Step:
    """float32 of 16-bit floats, but for the last source, which is float32."""
    target, *sources, last = instruction.operands
    reads, read_last = [operand(text, np.uint16) for text in sources], operand(last, np.float32)

    def run(block: Block, active: Value) -> None:
        values = [floats(read(block), kind) for read in reads]
        block.write(target, compute(*values, read_last(block)), active)

    return run


def _paired(compute: Callable[..., Value], instruction: Instruction) -> Step:
    """The same for both floats of 64-bit registers."""
    target, *sources = instruction.operands
    reads = [operand(text, np.uint64) for text in sources]

    def run(block: Block, active: Value) -> None:
        floats = [read(block).view(np.float32) for read in reads]
        block.write(target, compute(*floats).view(np.uint64), active)

    return run


def _fma_pairs(kind: str, target: str, *sources: str) -> Step:
    """Of both 16-bit floats of each register, in float64; rounded to bfloat16 by way of float32, to float16 at once."""
    reads = [operand(text, np.uint32) for text in sources]

    def run(block: Block, active: Value) -> None:
        a, b, c = (floats(read(block).view(np.uint16), kind).astype(np.float64) for read in reads)
        result = a * b + c
        bits = to_bfloat16(result) if kind == "bf16" else result.astype(np.float16).view(np.uint16)
        block.write(target, np.ascontiguousarray(bits).view(np.uint32), active)

    return run


def _wide(dtype: type) -> type:
    return WIDER[dtype]


def _u32(_: type) -> type:
    return np.uint32


def _multiply_wide(a: Value, b: Value) -> Value:
    return a.astype(WIDER[a.dtype.type]) * b.astype(WIDER[b.dtype.type])


def _multiply_high(a: Value, b: Value) -> Value:
    return (_multiply_wide(a, b) >> (8 * a.dtype.itemsize)).astype(a.dtype)


def _fused(a: Value, b: Value, c: Value) -> Value:
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _divide(a: Value, b: Value) -> Value:
    # numpy rounds integers down, PTX towards zero.
    return a / b if a.dtype.kind == "f" else ((a - np.fmod(a, b)) // b).astype(a.dtype)


def _shift_left(a: Value, n: Value) -> Value:
    width = 8 * a.dtype.itemsize
    return np.where(n < width, a << np.minimum(n, width - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a: Value, n: Value) -> Value:
    width = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(n, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(n < width, shifted, a.dtype.type(0))


def _extract_bits(a: Value, position: Value, length: Value) -> Value:
    width = 8 * a.dtype.itemsize
    left = (width - (position + length)).astype(a.dtype)
    if (position + length > width).any() or (length == 0).any():
        raise NotEmulated("bfe beyond the register")
    return (a << left) >> (width - length).astype(a.dtype)


def _permute_bytes(a: Value, b: Value, selector: Value) -> Value:
    both = np.ascontiguousarray(np.stack([a, b], 1)).view(np.uint8)
    nibbles = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
    if (nibbles & 8).any():
        raise NotEmulated("prmt with a sign")
    return np.ascontiguousarray(np.take_along_axis(both, nibbles.astype(np.int64), 1)).view(np.uint32)[:, 0]


def _max(a: Value, b: Value) -> Value:
    return np.fmax(a, b)


def _min(a: Value, b: Value) -> Value:
    return np.fmin(a, b)


# What computes, and the type of each source: None is the instruction's.
ARITHMETIC: dict[tuple[str, ...], tuple[Callable[..., Value], list]] = {
    ("add",): (np.add, [None, None]),
    ("sub",): (np.subtract, [None, None]),
    ("mul",): (np.multiply, [None, None]),
    ("mul", "wide"): (_multiply_wide, [None, None]),
    ("mul", "hi"): (_multiply_high, [None, None]),
    ("mad",): (lambda a, b, c: a * b + c, [None, None, None]),
    ("mad", "wide"): (lambda a, b, c: _multiply_wide(a, b) + c, [None, None, _wide]),
    ("fma",): (_fused, [None, None, None]),
    ("div",): (_divide, [None, None]),
    ("rem",): (np.fmod, [None, None]),
    ("min",): (_min, [None, None]),
    ("max",): (_max, [None, None]),
    ("and",): (np.bitwise_and, [None, None]),
    ("or",): (np.bitwise_or, [None, None]),
    ("xor",): (np.bitwise_xor, [None, None]),
    ("not",): (np.invert, [None]),
    ("neg",): (np.negative, [None]),
    ("abs",): (np.abs, [None]),
    ("shl",): (_shift_left, [None, _u32]),
    ("shr",): (_shift_right, [None, _u32]),
    ("bfe",): (_extract_bits, [None, _u32, _u32]),
    ("prmt",): (_permute_bytes, [None, None, None]),
    ("popc",): (lambda a: np.bitwise_count(a).astype(np.uint32), [None]),
    ("ex2",): (np.exp2, [None]),
    ("rcp",): (np.reciprocal, [None]),
}


def _move(kind: str, target: str, source: str) -> Step:
    targets, sources = split_vector(target), split_vector(source)
    dtype = TYPES[kind]
    if len(targets) == len(sources) == 1:
        read = operand(source, dtype)
        return lambda block, active: block.write(target, read(block), active)
    size = np.dtype(dtype).itemsize // max(len(targets), len(sources))
    part = UNSIGNED[8 * size]
    reads = [operand(text, dtype) if len(sources) == 1 else operand(text, part, undefined=True) for text in sources]

    def run(block: Block, active: Value) -> None:
        joined = np.ascontiguousarray(np.stack([read(block) for read in reads], 1))
        parts = joined.view(dtype if len(targets) == 1 else part)
        for i, name in enumerate(targets):
            if name != "_":
                block.write(name, np.ascontiguousarray(parts[:, i]), active)

    return run


def to_bfloat16(value: Value) -> Value:
    """Bits of the nearest bfloat16, ties to even."""
    bits = value.astype(np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def _convert(modifiers: list[str], target: str, *sources: str) -> Step:
    to, source = modifiers[-2:]
    if set(modifiers[:-2]) - {"rn", "ftz"}:
        raise NotEmulated(f"cvt.{'.'.join(modifiers)}")
    reads = [operand(text, TYPES[source]) for text in sources]

    def number(value: Value) -> Value:
        return (value.astype(np.uint32) << np.uint32(16)).view(np.float32) if source == "bf16" else value

    def packed(value: Value) -> Value:
        value = number(value)
        return to_bfloat16(value) if to[:2] == "bf" else value.astype(TYPES[to.removesuffix("x2")])

    def run(block: Block, active: Value) -> None:
        with np.errstate(all="ignore"):
            values = [packed(read(block)) for read in reads]
        if to.endswith("x2"):
            # The first source is the upper half.
            values = [np.ascontiguousarray(np.stack(values[::-1], 1)).view(np.uint32)[:, 0]]
        block.write(target, values[0], active)

    return run


COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    # Also true if one of the two is NaN.
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}


def _compare(modifiers: list[str], target: str, *sources: str) -> Step:
    name, kind = modifiers[0], modifiers[-1]
    if name not in COMPARISONS or set(modifiers[1:-1]) - {"ftz"} or len(sources) != 2:
        raise NotEmulated(f"setp.{'.'.join(modifiers)}")
    first, second = (operand(text, TYPES[kind]) for text in sources)
    return lambda block, active: block.write(target, COMPARISONS[name](first(block), second(block)), active)
