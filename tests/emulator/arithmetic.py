"""Arithmetic, comparison, conversion and moves: what each thread does by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import numpy as np

from tests.emulator.machine import TYPES, UNSIGNED, WIDER, Block, NotEmulated, Step, Value, operand, split_vector
from tests.emulator.matrix import floats
from tests.emulator.ptx import Instruction
from tests.emulator.rounding import flush, fused, fused_halves, maximum, minimum, to_bfloat16


def arithmetic(instruction: Instruction) -> Step:
    """The step of one instruction. Raises NotEmulated if it is none of these."""
    make = OPCODES.get(instruction.opcode)
    if make is None:
        raise NotEmulated(str(instruction))
    return make(instruction)


def _arithmetic(compute: Callable[..., Value], types: list[type], instruction: Instruction) -> Step:
    target, *sources = instruction.operands
    if len(sources) != len(types):
        raise NotEmulated(str(instruction))
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
        with np.errstate(all="ignore"):
            values = [floats(read(block), kind) for read in reads]
            block.write(target, compute(*values, read_last(block)), active)

    return run


def _paired(compute: Callable[..., Value], instruction: Instruction) -> Step:
    """The same for both floats of 64-bit registers."""
    target, *sources = instruction.operands
    reads = [operand(text, np.uint64) for text in sources]

    def run(block: Block, active: Value) -> None:
        with np.errstate(all="ignore"):
            result = compute(*(read(block).view(np.float32) for read in reads))
        block.write(target, result.view(np.uint64), active)

    return run


def _fma_pairs(kind: str, instruction: Instruction) -> Step:
    """Of both 16-bit floats of each register."""
    target, *sources = instruction.operands
    reads = [operand(text, np.uint32) for text in sources]

    def run(block: Block, active: Value) -> None:
        with np.errstate(all="ignore"):
            bits = fused_halves(*(floats(read(block).view(np.uint16), kind) for read in reads), kind)
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


def _divide(a: Value, b: Value) -> Value:
    # numpy rounds integers down, PTX towards zero.
    return ((a - np.fmod(a, b)) // b).astype(a.dtype)


def _shift_left(a: Value, n: Value) -> Value:
    width = 8 * a.dtype.itemsize
    return np.where(n < width, a << np.minimum(n, width - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a: Value, n: Value) -> Value:
    width = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(n, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(n < width, shifted, a.dtype.type(0))


def _funnel_left(low: Value, high: Value, n: Value) -> Value:
    """The upper half of both, shifted by less than 32."""
    return _shift_left(high, n & 31) | _shift_right(low, 32 - (n & 31))


def _funnel_right(low: Value, high: Value, n: Value) -> Value:
    return _shift_right(low, n & 31) | _shift_left(high, 32 - (n & 31))


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


def _flushed(compute: Callable[..., Value]) -> Callable[..., Value]:
    return lambda *values: flush(compute(*map(flush, values)))


def _move(kind: str, instruction: Instruction) -> Step:
    target, source = instruction.operands
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


def _convert(to: str, source: str, instruction: Instruction) -> Step:
    target, *sources = instruction.operands
    if len(sources) != (2 if to.endswith("x2") else 1):
        raise NotEmulated(str(instruction))
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


def _compare(compare: Callable[..., Value], kind: str, instruction: Instruction) -> Step:
    if len(instruction.operands) != 3 or "|" in instruction.operands[0]:
        raise NotEmulated(str(instruction))
    return _arithmetic(compare, [TYPES[kind]] * 2, instruction)


def _compare_halves(compare: Callable[..., Value], kind: str, instruction: Instruction) -> Step:
    """16-bit floats; of both of a register where there are two, each with a predicate of its own."""
    (targets, *sources), pairs = instruction.operands, kind.endswith("x2")
    names = targets.split("|")
    if len(sources) != 2 or len(names) != 1 + pairs:
        raise NotEmulated(str(instruction))
    reads = [operand(text, np.uint32 if pairs else np.uint16) for text in sources]

    def run(block: Block, active: Value) -> None:
        a, b = (floats(read(block).view(np.uint16), kind.removesuffix("x2")) for read in reads)
        results = compare(a, b).reshape(-1, len(names))
        for name, result in zip(names, results.T, strict=True):
            block.write(name, result, active)

    return run


INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
LONG_INTEGERS = INTEGERS[2:]
BITS = ("b16", "b32", "b64")
# What computes, the type of each source but for the instruction's own (None), and the types it is for.
FORMS: dict[str, tuple[Callable[..., Value], list, tuple[str, ...]]] = {
    "add": (np.add, [None, None], (*INTEGERS, "f32")),
    "sub": (np.subtract, [None, None], (*INTEGERS, "f32")),
    "mul": (np.multiply, [None, None], ("f32",)),
    "mul.lo": (np.multiply, [None, None], INTEGERS),
    "mul.wide": (_multiply_wide, [None, None], INTEGERS[:4]),
    "mul.hi": (_multiply_high, [None, None], ("u32", "s32")),
    "mad.lo": (lambda a, b, c: a * b + c, [None, None, None], INTEGERS),
    "mad.wide": (lambda a, b, c: _multiply_wide(a, b) + c, [None, None, _wide], ("u32", "s32")),
    "fma.rn": (fused, [None, None, None], ("f32",)),
    "div": (_divide, [None, None], LONG_INTEGERS),
    # Within 2 ulp, here nearer.
    "div.full": (np.divide, [None, None], ("f32",)),
    "div.approx": (np.divide, [None, None], ("f32",)),
    "rem": (np.fmod, [None, None], LONG_INTEGERS),
    "min": (minimum, [None, None], (*LONG_INTEGERS, "f32")),
    "max": (maximum, [None, None], (*LONG_INTEGERS, "f32")),
    "and": (np.bitwise_and, [None, None], (*BITS, "pred")),
    "or": (np.bitwise_or, [None, None], (*BITS, "pred")),
    "xor": (np.bitwise_xor, [None, None], (*BITS, "pred")),
    "not": (np.invert, [None], (*BITS, "pred")),
    "neg": (np.negative, [None], ("s32", "s64", "f32")),
    "abs": (np.abs, [None], ("s32", "f32", "ftz.f32")),
    "shl": (_shift_left, [None, _u32], BITS),
    "shr": (_shift_right, [None, _u32], (*INTEGERS, *BITS)),
    "shf.l.wrap": (_funnel_left, [None, None, None], ("b32",)),
    "shf.r.wrap": (_funnel_right, [None, None, None], ("b32",)),
    "bfe": (_extract_bits, [None, _u32, _u32], LONG_INTEGERS),
    "prmt": (_permute_bytes, [None, None, None], ("b32",)),
    "popc": (lambda a: np.bitwise_count(a).astype(np.uint32), [None], ("b32", "b64")),
    # Within 2 ulp, here nearer.
    "ex2.approx": (np.exp2, [None], ("f32",)),
    "selp": (lambda a, b, p: np.where(p, a, b), [None, None, lambda _: bool], (*BITS, "f32")),
}
# Those that have a form that flushes subnormal numbers.
FLUSHING = ("add", "sub", "mul", "fma.rn", "div.full", "div.approx", "min", "max", "ex2.approx")
ORDERS = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
EQUALITIES = {"eq": np.equal, "ne": np.not_equal}
FLOAT_COMPARISONS = {
    **ORDERS,
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    # Also true if one of the two is NaN.
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
}
FLOAT_CONVERSIONS = ("f32.bf16", "f32.f16", "rn.bf16.f32", "rn.f16.f32", "rn.bf16x2.f32", "rn.f16x2.f32")


def _opcodes() -> Iterator[tuple[str, Callable[[Instruction], Step]]]:
    for name, (compute, kinds, types) in FORMS.items():
        for kind in types:
            dtype = TYPES[kind.removeprefix("ftz.")]
            sources = [dtype if kind is None else kind(dtype) for kind in kinds]
            yield f"{name}.{kind}", partial(_arithmetic, _flushed(compute) if "ftz" in kind else compute, sources)
        if name in FLUSHING:
            yield f"{name}.ftz.f32", partial(_arithmetic, _flushed(compute), [np.float32] * len(kinds))
    for name, compute in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("fma.rn", fused)):
        yield f"{name}.f32x2", partial(_paired, compute)
    for kind in ("bf16", "f16"):
        yield f"fma.rn.{kind}x2", partial(_fma_pairs, kind)
        for name, compute in (("add.rn", np.add), ("sub.rn", np.subtract), ("fma.rn", fused)):
            yield f"{name}.f32.{kind}", partial(_mixed, compute, kind)
    for kind in (*BITS, *UNSIGNED_TYPES, "f32", "pred"):
        yield f"mov.{kind}", partial(_move, kind)
    for to, source in product(INTEGERS, repeat=2):
        yield f"cvt.{to}.{source}", partial(_convert, to, source)
    for form in FLOAT_CONVERSIONS:
        yield f"cvt.{form}", partial(_convert, *form.split(".")[-2:])
    for comparisons, kinds in (
        (ORDERS, INTEGERS),
        (EQUALITIES, (*INTEGERS, *BITS)),
        (FLOAT_COMPARISONS, ("f32",)),
    ):
        for (name, compare), kind in product(comparisons.items(), kinds):
            yield f"setp.{name}.{kind}", partial(_compare, compare, kind)
    for (name, compare), kind in product(FLOAT_COMPARISONS.items(), ("f16", "bf16", "f16x2", "bf16x2")):
        yield f"setp.{name}.{kind}", partial(_compare_halves, compare, kind)


UNSIGNED_TYPES = ("u16", "u32", "u64")
OPCODES: dict[str, Callable[[Instruction], Step]] = dict(_opcodes())
