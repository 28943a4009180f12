"""Weights to quantize, and what a quantizer made of them."""

import torch

from alphaq_vllm.packing import dequantize


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def student_t5(*shape):
    squares = sum(gaussian(*shape, seed=seed).square() for seed in range(1, 6))
    return gaussian(*shape) / (squares / 5).sqrt()


def restore(quantized, num_bits):
    return dequantize(quantized.packed, quantized.scale, quantized.grid, num_bits)


def assert_rounded_to_8_bits(stored, weight):
    """In every row the error of rounding to 8 bits, and some: both ``[..., out_features, in_features]``.

    The root of a row's mean squared error is that of rounding to steps which are as large as they may be. The least
    squared error of a group can leave its last weights beyond the grid, by less than two steps of its range.
    """
    error, largest = (stored.float() - weight.float()).abs(), weight.abs().max()
    assert 0 < error.square().mean(-1).sqrt().max() < largest / 300
    assert error.max() < largest * 4 / 255
