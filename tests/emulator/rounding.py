"""Floats as PTX rounds them: to nearest, ties to even, once."""

from __future__ import annotations

import numpy as np

Value = np.ndarray


def _odd_sum(a: Value, b: Value) -> Value:
    """``a + b`` in float64, rounded to odd, so that rounding it once more gives what rounding once would."""
    total = a + b
    back = total - a
    error = (a - (total - back)) + (b - back)
    bits = total.view(np.int64)
    fix = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    return np.where(fix, bits + np.where((error > 0) == (total > 0), 1, -1), bits).view(np.float64)


def _sum_for(a: Value, b: Value, bits: int, least: float) -> Value:
    """``a + b`` in float64, to be rounded to that many bits of mantissa; subnormal below least."""
    total = a + b
    # Rounding twice differs only where float64 lies half way between two of the narrower floats.
    below = 53 - bits
    half_way = (total.view(np.int64) & (1 << below) - 1) == 1 << below - 1
    subnormal = (np.abs(total) < least) & (total != 0)
    return _odd_sum(a, b) if (half_way | subnormal).any() else total


def fused(a: Value, b: Value, c: Value) -> Value:
    """``a * b + c`` of float32, rounded once."""
    return _sum_for(a.astype(np.float64) * b, c.astype(np.float64), 24, 2.0**-126).astype(np.float32)


def fused_halves(a: Value, b: Value, c: Value, kind: str) -> Value:
    """Bits of ``a * b + c`` of 16-bit floats, given as float32; rounded once."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    if kind == "bf16":
        return to_bfloat16(_sum_for(product, c, 8, 2.0**-126))
    return _sum_for(product, c, 11, 2.0**-14).astype(np.float16).view(np.uint16)


def to_bfloat16(value: Value) -> Value:
    """Bits of the nearest bfloat16 to float32 or float64, ties to even."""
    single = value.astype(np.float32)
    bits = single.view(np.uint32)
    if value.dtype == np.float64:
        # To odd: towards zero, and the last bit tells that something was cut off.
        bits = bits - (np.abs(single) > np.abs(value)) | (single != value).astype(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded.astype(np.uint16))


def flush(value: Value) -> Value:
    """.ftz: subnormal float32 to zero of the same sign."""
    return np.where(np.abs(value) < np.float32(2.0**-126), np.copysign(np.float32(0), value), value)


def minimum(a: Value, b: Value) -> Value:
    """The number if the other is NaN, NaN if both are; -0 is less than +0."""
    if a.dtype.kind != "f":
        return np.minimum(a, b)
    least = np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))
    return np.where(np.isnan(least), _NAN, least)


def maximum(a: Value, b: Value) -> Value:
    """As ``minimum``."""
    if a.dtype.kind != "f":
        return np.maximum(a, b)
    most = np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))
    return np.where(np.isnan(most), _NAN, most)


_NAN = np.uint32(0x7FFFFFFF).view(np.float32)
