"""Numbers to compare the emulator's arithmetic with, from Python's integers and fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np


def wrap(value: int, dtype: type) -> int:
    bits = 8 * np.dtype(dtype).itemsize
    value %= 1 << bits
    return value - (1 << bits) if np.dtype(dtype).kind == "i" and value >> bits - 1 else value


def corners(dtype: type) -> list[int]:
    if dtype is bool:
        return [0, 1]
    info = np.iinfo(dtype)
    inside = (0, 1, 2, 7, 0x35, 100)
    return sorted({*inside, *(wrap(-n, dtype) for n in inside), info.min, info.max, info.max // 2 + 1, info.max // 3})


def nearest(x: Fraction, bits: int, least: int, most: int) -> float:
    """Of a float of that many bits and those exponents, the nearest; ties to even."""
    if not x:
        return 0.0
    exponent = max(
        math.floor(Fraction(abs(x)).numerator.bit_length() - Fraction(abs(x)).denominator.bit_length()), least
    )
    while Fraction(2) ** exponent > abs(x) and exponent > least:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= abs(x):
        exponent += 1
    quantum = Fraction(2) ** (exponent - bits + 1)
    rounded = round(x / quantum) * quantum
    return math.copysign(math.inf, x) if abs(rounded) >= Fraction(2) ** (most + 1) else float(rounded)


KINDS = {"f32": (24, -126, 127), "bf16": (8, -126, 127), "f16": (11, -14, 15)}


def floats_of(kind: str) -> np.ndarray:
    """Finite ones: small, large, subnormal, half way between others."""
    bits, least, most = KINDS[kind]
    one = [1.0, 1 + 2.0 ** (1 - bits), 1.5, 3.0, 0.1, 100.3, 2.0**-9, 2.0 ** (least + 2), 2.0 ** (least - 1), 2.0**most]
    values = [nearest(Fraction(v), bits, least, most) for v in one]
    return np.array([*values, *(-v for v in values), 0.0], np.float32)


def to_bits(values: np.ndarray, kind: str) -> np.ndarray:
    return values.view(np.uint32) >> 16 if kind == "bf16" else values.astype(np.float16).view(np.uint16)


def from_bits(bits: np.ndarray, kind: str) -> np.ndarray:
    return (
        (bits.astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else bits.view(np.float16).astype(np.float32)
    )
