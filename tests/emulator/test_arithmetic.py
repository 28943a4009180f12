"""Vectors of arithmetic: each opcode on corner values, compared with Python's integers and fractions."""

from __future__ import annotations

import math
import operator
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from tests.emulator.arithmetic import OPCODES
from tests.emulator.machine import TYPES, NotEmulated
from tests.emulator.reference import KINDS, corners, floats_of, from_bits, nearest, to_bits, wrap
from tests.emulator.run import run

INFINITE, NAN = math.inf, math.nan
LARGEST, LEAST = float(np.finfo(np.float32).max), 2.0**-149


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


# From operands as Python integers, and the width in bits; what does not fit is cut off. Shorter names come last.
INTEGER = {
    "add": lambda a, b, w: a + b,
    "sub": lambda a, b, w: a - b,
    "mul.lo": lambda a, b, w: a * b,
    "mul.wide": lambda a, b, w: a * b,
    "mul.hi": lambda a, b, w: a * b >> w,
    "mad.lo": lambda a, b, c, w: a * b + c,
    "mad.wide": lambda a, b, c, w: a * b + c,
    "div": lambda a, b, w: towards_zero(a, b) if b else None,
    "rem": lambda a, b, w: a - b * towards_zero(a, b) if b else None,
    "min": lambda a, b, w: min(a, b),
    "max": lambda a, b, w: max(a, b),
    "and": lambda a, b, w: a & b,
    "or": lambda a, b, w: a | b,
    "xor": lambda a, b, w: a ^ b,
    "not": lambda a, w: ~a,
    "neg": lambda a, w: -a,
    "abs": lambda a, w: abs(a),
    "shl": lambda a, n, w: a << n,
    "shr": lambda a, n, w: a >> n,
    "shf.l.wrap": lambda a, b, n, w: (b << w | a) << n % w >> w,
    "shf.r.wrap": lambda a, b, n, w: (b << w | a) >> n % w,
    "popc": lambda a, w: bin(a).count("1"),
    "bfe": lambda a, at, n, w: field(a, at, n, w),
    "selp": lambda a, b, p, w: a if p else b,
    "mov": lambda a, w: a,
}
SHIFTS = (0, 1, 15, 16, 31, 32, 33, 63, 64, 255)
THIRD = {"bfe": (1, 5, 16), "selp": (0, 1), "shf": SHIFTS}
COMPARE = {name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}
FRACTIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
}
# Opcode, operands, result; of special values, whose bits are compared, but for NaN's.
SPECIAL = [
    *(("min.f32", a, b) for a, b in (((0.0, -0.0), -0.0), ((-0.0, 0.0), -0.0), ((NAN, 1.0), 1.0), ((1.0, NAN), 1.0))),
    *(
        ("max.f32", a, b)
        for a, b in (((0.0, -0.0), 0.0), ((-0.0, 0.0), 0.0), ((NAN, NAN), NAN), ((-INFINITE, NAN), -INFINITE))
    ),
    *(("min.ftz.f32", (LEAST, 1.0), 0.0), ("max.ftz.f32", (-LEAST, -1.0), -0.0)),
    *(("neg.f32", (0.0,), -0.0), ("neg.f32", (-2.5,), 2.5), ("abs.f32", (-0.0,), 0.0), ("abs.f32", (-LEAST,), LEAST)),
    *(("abs.ftz.f32", (-LEAST,), 0.0), ("abs.ftz.f32", (-3.0,), 3.0)),
    *(("add.f32", (INFINITE, -INFINITE), NAN), ("add.f32", (LARGEST, LARGEST), INFINITE)),
    *(("add.f32", (-0.0, 0.0), 0.0), ("add.f32", (-0.0, -0.0), -0.0), ("sub.f32", (1.0, 1.0), 0.0)),
    *(("mul.f32", (0.0, INFINITE), NAN), ("mul.f32", (-0.0, 5.0), -0.0), ("mul.f32", (2.0**-149, 0.5), 0.0)),
    *(
        ("add.ftz.f32", (LEAST, LEAST), 0.0),
        ("sub.ftz.f32", (-LEAST, 0.0), -0.0),
        ("mul.ftz.f32", (2.0**-100, -(2.0**-30)), -0.0),
    ),
    *(("fma.rn.f32", (INFINITE, 0.0, 1.0), NAN), ("fma.rn.ftz.f32", (2.0**-100, 2.0**-30, LEAST), 0.0)),
    # Rounded twice, by way of float64, this would be 1.
    ("fma.rn.f32", (1.0, 1.0 + 2.0**-23, -(2.0**-24) + 2.0**-48), 1.0 + 2.0**-23),
    *(("div.full.f32", (1.0, 0.0), INFINITE), ("div.full.f32", (0.0, 0.0), NAN), ("div.full.f32", (-3.0, 2.0), -1.5)),
    ("div.full.ftz.f32", (LEAST, 1.0), 0.0),
    *(("div.approx.f32", (1.0, 0.0), INFINITE), ("div.approx.f32", (-3.0, 2.0), -1.5)),
    ("div.approx.ftz.f32", (LEAST, 1.0), 0.0),
    *(
        ("ex2.approx.f32", (x,), y)
        for x, y in ((-INFINITE, 0.0), (INFINITE, INFINITE), (-0.0, 1.0), (-127.0, 2.0**-127))
    ),
    *(("ex2.approx.ftz.f32", (x,), y) for x, y in ((-127.0, 0.0), (LEAST, 1.0), (NAN, NAN), (128.0, INFINITE))),
    *(("selp.f32", (1.0, NAN, True), 1.0), ("mov.f32", (-0.0,), -0.0)),
]


def field(a: int, at: int, length: int, width: int) -> int | None:
    """bfe, where the field lies inside of the register."""
    if at + length > width:
        return None
    return a >> at & (1 << length) - 1


def register(i: int, dtype: type) -> str:
    return f"%{'p' if dtype is bool else {2: 'h', 4: 'r', 8: 'd'}[np.dtype(dtype).itemsize]}{i}"


def compute(opcode: str, operands: list[np.ndarray], result: type) -> np.ndarray:
    """One opcode on rows of operands."""
    rows = len(operands[0])
    names = [register(i + 1, values.dtype.type if values.dtype != bool else bool) for i, values in enumerate(operands)]
    padded = {name: np.resize(values, -(-rows // 32) * 32) for name, values in zip(names, operands, strict=True)}
    target = register(0, result)
    threads = max(-(-rows // 32) * 32, 32)
    block = run(f"{opcode} {target}, {', '.join(names)};", padded, threads=threads)
    return block.registers[target][:rows].view(result)


def by_name(opcode: str, table: dict):
    return next((table[name] for name in table if opcode.startswith(f"{name}.")), None)


def check_integers(opcode: str) -> bool:
    reference, kind = by_name(opcode, INTEGER), opcode.split(".")[-1]
    if reference is None or kind in KINDS or kind not in TYPES:
        return False
    dtype, name = TYPES[kind], opcode.split(".")[0]
    wide = {2: "4", 4: "8"}.get(np.dtype(dtype).itemsize)
    result = np.dtype(np.dtype(dtype).kind + wide).type if "wide" in opcode else np.uint32 if name == "popc" else dtype
    values = corners(dtype)
    sources = reference.__code__.co_argcount - 1
    lists, types = [values] * sources, [dtype] * sources
    if name in ("shl", "shr", "bfe"):
        lists[1:], types[1:] = [SHIFTS], [np.uint32] * (sources - 1)
    if name in THIRD:
        lists[2:], types[2:] = [THIRD[name]], [bool if name == "selp" else np.uint32]
    if name == "mad":
        lists[2], types[2] = corners(result), result
    width = 8 * np.dtype(dtype).itemsize
    rows = [(row, reference(*row, width)) for row in product(*lists)]
    if opcode.startswith("bfe.s"):
        # The highest bit of the field is its sign.
        rows = [(row, e and e - (1 << row[2] if e >> row[2] - 1 else 0)) for row, e in rows]
    rows = [(row, expected) for row, expected in rows if expected is not None]
    operands = [np.array([row[i] for row, _ in rows], t) for i, t in enumerate(types)]
    expected = [bool(e & 1) if result is bool else wrap(e, result) for _, e in rows]
    assert compute(opcode, operands, result).tolist() == expected
    return True


def check_comparison(opcode: str) -> bool:
    if not opcode.startswith("setp."):
        return False
    _, name, kind = opcode.split(".")
    halves = kind.removesuffix("x2") in ("f16", "bf16")
    least = 2.0**-24 if halves else LEAST
    fractions = [-INFINITE, -1.0, -0.0, 0.0, least, 2.5, INFINITE, NAN]
    values = fractions if halves or kind == "f32" else corners(TYPES[kind])
    pairs = list(product(values, repeat=2))
    unordered = (halves or kind == "f32") and name.endswith("u")
    compare = COMPARE[name.removesuffix("u") if unordered else name]
    expected = [unordered if NAN in pair or any(v != v for v in pair) else compare(*pair) for pair in pairs]
    if halves:
        floats = (np.array([pair[i] for pair in pairs], np.float32) for i in range(2))
        operands = [to_bits(column, kind.removesuffix("x2")).astype(np.uint16) for column in floats]
        if kind.endswith("x2"):
            words = {f"%r{i + 1}": np.stack([b, b[::-1]], 1).view(np.uint32)[:, 0] for i, b in enumerate(operands)}
            block = run(f"{opcode} %p1|%p2, %r1, %r2;", words, threads=len(pairs))
            assert block.registers["%p1"].tolist() == expected
            assert block.registers["%p2"].tolist() == expected[::-1]
            return True
    else:
        operands = [np.array([pair[i] for pair in pairs], TYPES[kind]) for i in range(2)]
    assert compute(opcode, operands, bool).tolist() == expected
    return True


def check_floats(opcode: str) -> bool:
    name, *modifiers = opcode.split(".")
    reference, kind = FRACTIONS.get(name), modifiers[-1]
    if reference is None or kind not in ("f32", "f32x2", "bf16", "f16", "bf16x2", "f16x2"):
        return False
    small, flushed = kind.removesuffix("x2"), "ftz" in modifiers
    sources = reference.__code__.co_argcount
    mixed = kind in ("bf16", "f16")
    lists = [floats_of(small)] * sources
    if mixed:
        lists[-1] = floats_of("f32")
    rows = np.array(list(product(*lists)), np.float32)
    target = "f32" if mixed else small
    if flushed:
        rows[np.abs(rows) < 2.0**-126] = 0
    expected = np.array([nearest(reference(*map(Fraction, row)), *KINDS[target]) for row in rows.tolist()], np.float32)
    if flushed:
        expected[np.abs(expected) < 2.0**-126] = 0
    columns = [np.ascontiguousarray(rows[:, i]) for i in range(sources)]
    if kind == "f32":
        actual = compute(opcode, columns, np.float32)
    elif mixed:
        actual = compute(opcode, [*(to_bits(c, kind).astype(np.uint16) for c in columns[:-1]), columns[-1]], np.float32)
    elif kind == "f32x2":
        pairs = [np.stack([c, c[::-1]], 1).view(np.uint64)[:, 0] for c in columns]
        both = compute(opcode, pairs, np.uint64).view(np.float32).reshape(-1, 2)
        np.testing.assert_array_equal(both[:, 1], expected[::-1])
        actual = both[:, 0]
    else:
        words = [to_bits(c, small).astype(np.uint16) for c in columns]
        pairs = [np.stack([w, w[::-1]], 1).view(np.uint32)[:, 0] for w in words]
        both = compute(opcode, pairs, np.uint32).view(np.uint16).reshape(-1, 2)
        np.testing.assert_array_equal(from_bits(np.ascontiguousarray(both[:, 1]), small), expected[::-1])
        actual = from_bits(np.ascontiguousarray(both[:, 0]), small)
    np.testing.assert_array_equal(actual, expected)
    return True


def check_conversion(opcode: str) -> bool:
    name, *modifiers = opcode.split(".")
    if name != "cvt":
        return False
    to, source = modifiers[-2:]
    if to in KINDS and source in ("bf16", "f16"):
        values = np.append(floats_of(source), [INFINITE, -0.0]).astype(np.float32)
        actual = compute(opcode, [to_bits(values, source).astype(np.uint16)], np.float32)
        np.testing.assert_array_equal(actual.view(np.uint32), values.view(np.uint32))
    elif source == "f32":
        kind = to.removesuffix("x2")
        half_way = [
            1 + 2.0**-8,
            1 + 3 * 2.0**-8,
            1 + 2.0**-8 + 2.0**-20,
            1 + 2.0**-11,
            1 + 3 * 2.0**-11,
            65520.0,
            2.0**-25,
        ]
        values = np.concatenate([floats_of("f32"), half_way]).astype(np.float32)
        expected = np.array([nearest(Fraction(v), *KINDS[kind]) for v in values.tolist()], np.float32)
        if to == kind:
            actual = compute(opcode, [values], np.uint16)
        else:
            # The first operand is the upper half.
            both = compute(opcode, [values[::-1].copy(), values], np.uint32).view(np.uint16).reshape(-1, 2)
            np.testing.assert_array_equal(from_bits(np.ascontiguousarray(both[:, 1]), kind), expected[::-1])
            actual = np.ascontiguousarray(both[:, 0])
        np.testing.assert_array_equal(from_bits(actual, kind), expected)
    else:
        values = corners(TYPES[source])
        expected = [wrap(v, TYPES[to]) for v in values]
        assert compute(opcode, [np.array(values, TYPES[source])], TYPES[to]).tolist() == expected
    return True


def check_special(opcode: str) -> bool:
    rows = [(operands, expected) for name, operands, expected in SPECIAL if name == opcode]
    for operands, expected in rows:
        arrays = [np.array([v], bool if isinstance(v, bool) else np.float32) for v in operands]
        actual = compute(opcode, arrays, np.float32)
        np.testing.assert_array_equal(actual, np.float32([expected]))
        assert math.isnan(expected) or np.signbit(actual[0]) == np.signbit(expected)
    return bool(rows)


def check_permutation(opcode: str) -> bool:
    if opcode != "prmt.b32":
        return False
    a, b = 0x33221100, 0x77665544
    for selector, expected in (
        (0x3210, a),
        (0x7654, b),
        (0x0123, 0x00112233),
        (0x5410, 0x55441100),
        (0x7777, 0x77777777),
    ):
        operands = [np.array([v], np.uint32) for v in (a, b, selector)]
        assert compute(opcode, operands, np.uint32)[0] == expected
    with pytest.raises(NotEmulated, match="prmt with a sign"):
        compute(opcode, [np.array([v], np.uint32) for v in (a, b, 0x8)], np.uint32)
    return True


@pytest.mark.parametrize("opcode", OPCODES)
def test_every_opcode_has_vectors_and_agrees(opcode):
    checks = (check_integers, check_comparison, check_floats, check_conversion, check_special, check_permutation)
    assert any([check(opcode) for check in checks])


@pytest.mark.parametrize(
    ("opcode", "bound"), [("ex2.approx.f32", 2.0**-22), ("div.full.f32", 2.0**-22), ("div.approx.f32", 2.0**-22)]
)
def test_approximations_are_within_the_bounds_of_ptx(opcode, bound):
    rng = np.random.default_rng(0)
    values = [rng.uniform(-120, 120, 256).astype(np.float32), rng.uniform(1, 9, 256).astype(np.float32)]
    wide = [v.astype(np.float64) for v in values]
    expected = np.exp2(wide[0]) if opcode[0] == "e" else wide[0] / wide[1]
    actual = compute(opcode, values[: 1 if opcode[0] == "e" else 2], np.float32)
    assert np.abs(actual / expected - 1).max() <= bound


def test_moves_split_and_join():
    block = run(
        "mov.b64 {%r1, %r2}, %d1; mov.b64 %d2, {%r2, %r1}; mov.b32 {%h1, _}, %r1; mov.b32 %r3, {%h1, %h1};",
        {"%d1": np.uint64(0x1122334455667788)},
    )
    assert hex(block.registers["%d2"][0]) == "0x5566778811223344"
    assert hex(block.registers["%r3"][0]) == "0x77887788"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "add.sat.s32 %r0, %r1, %r2",
            "cvt.rz.f32.f16 %r0, %h1",
            "cvt.rzi.s32.f32 %r0, %r1",
            "cvt.sat.u16.u32 %h0, %r1",
        ),
        *("setp.lt.and.s32 %p0, %r1, %r2, %p1", "setp.lt.s32 %p0|%p1, %r1, %r2", "prmt.b32.f4e %r0, %r1, %r2, %r3"),
        *("fma.rz.f32 %r0, %r1, %r2, %r3", "mul.rn.sat.f32 %r0, %r1, %r2", "rcp.approx.f32 %r0, %r1"),
        *("lop3.b32 %r0, %r1, %r2, %r3, 0x80", "shf.l.clamp.b32 %r0, %r1, %r2, %r3", "vote.sync.any.pred %p0, %p1, -1"),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(text):
    with pytest.raises(NotEmulated, match=text.split()[0].replace(".", r"\.")):
        run(f"{text};", {name: np.uint32(1) for name in ("%r1", "%r2", "%r3")})
