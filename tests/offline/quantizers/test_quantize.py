"""Data-free quantization: its error on known distributions, exactness, and extremes."""

import math

import pytest
import torch

from alphaq_vllm.format import matrix_tensors
from offline.quantizers import quantize as module
from offline.quantizers.quantize import quantization_mse, quantize
from tests.offline.quantizers.samples import gaussian, restore, student_t5


def true_mse(weight, quantized, num_bits):
    return (restore(quantized, num_bits).double() - weight.float().double()).square().mean().item()


# The error of a search over a grid with 300 starts, plus 2 %.
@pytest.mark.parametrize(
    ("sample", "num_bits", "limit"),
    [
        (gaussian, 1, 0.362),
        (gaussian, 2, 0.112),
        (gaussian, 3, 0.0323),
        (gaussian, 4, 0.0084),
        (gaussian, 8, 3.2e-5),
        (student_t5, 2, 0.172),
        (student_t5, 3, 0.0556),
        (student_t5, 4, 0.0149),
    ],
)
def test_quantize_reaches_the_least_error_known(sample, num_bits, limit):
    weight = sample(128, 2048)
    assert quantize(weight, num_bits, 128).mse / weight.var().item() < limit


@pytest.mark.parametrize("num_bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_quantize_reports_the_error_of_what_is_stored(num_bits, dtype):
    weight = (gaussian(24, 256) * gaussian(24, 1, seed=1).exp() + 0.3).to(dtype)
    quantized = quantize(weight, num_bits, 64)
    assert quantized.mse == pytest.approx(true_mse(weight, quantized, num_bits), rel=1e-4)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("num_bits", [1, 3, 8])
@pytest.mark.parametrize("shape", [(1, 128), (7, 384), (130, 128)])
def test_quantize_gives_the_tensors_of_the_format(group_size, num_bits, shape):
    quantized = quantize(gaussian(*shape), num_bits, group_size)
    specs = matrix_tensors(*shape, num_bits, group_size).values()
    tensors = (quantized.packed, quantized.scale, quantized.zero_point)
    assert [(t.shape, t.dtype) for t in tensors] == [(torch.Size(s.shape), s.dtype) for s in specs]


def test_quantize_picks_the_nearest_code_of_the_stored_grid():
    weight = gaussian(16, 128)
    quantized = quantize(weight, 3, 128)
    grid = (torch.arange(8) - quantized.zero_point.float()) * quantized.scale.float()
    nearest = (weight[..., None] - grid[:, None, :]).abs().amin(-1)
    torch.testing.assert_close((restore(quantized, 3) - weight).abs(), nearest)


def test_quantize_depends_on_nothing_but_the_group(monkeypatch):
    weight = gaussian(40, 256)
    whole, part = quantize(weight, 3, 64), quantize(weight[8:24, 64:192], 3, 64)
    torch.testing.assert_close(restore(whole, 3)[8:24, 64:192], restore(part, 3), rtol=0, atol=0)
    monkeypatch.setattr(module, "CPU_CHUNK", 1)
    assert torch.equal(quantize(weight, 3, 64).packed, whole.packed)


@pytest.mark.parametrize("num_bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantize_is_exact_on_constant_groups(num_bits, dtype):
    values = torch.tensor([0.0, 1.0, -1.0, 0.1, -3.3e-5, 1234.5, -6e4, 1.9990234375]).to(dtype)
    weight = values.repeat_interleave(32).expand(3, -1)
    quantized = quantize(weight, num_bits, 32)
    assert torch.equal(restore(quantized, num_bits), weight.float())
    assert quantized.mse == 0


@pytest.mark.parametrize("num_bits", [1, 2, 4])
def test_quantize_is_exact_on_a_grid(num_bits):
    weight = (gaussian(8, 128).abs() * 100 % 2**num_bits).floor() * 0.25 - 0.5
    assert quantize(weight, num_bits, 128).mse < 1e-12


@pytest.mark.parametrize("num_bits", [1, 2, 3, 8])
@pytest.mark.parametrize("scale", [2.0**-110, 2.0**-66, 2.0**66, 2.0**123])
def test_quantize_does_not_depend_on_scale(num_bits, scale):
    weight = gaussian(8, 128)
    scaled, plain = quantize(weight * scale, num_bits, 128), quantize(weight, num_bits, 128)
    assert torch.equal(scaled.packed, plain.packed)
    assert scaled.mse / scale**2 == pytest.approx(plain.mse, rel=1e-6)


@pytest.mark.parametrize("num_bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    "weight",
    [
        torch.full((2, 128), 3e38) * torch.tensor([1.0, -1.0]).repeat(64),
        torch.full((1, 128), 1e-40),
        gaussian(4, 128) * 1e-42,
        1e4 + gaussian(4, 128) * 1e-3,
        (1 + gaussian(4, 128) * 2**-8).bfloat16(),
        torch.zeros(2, 128).index_fill_(1, torch.tensor([5]), 1e30),
        torch.zeros(2, 128).index_fill_(1, torch.tensor([5]), -1e-30),
        gaussian(8, 1) @ gaussian(1, 128, seed=1),
        gaussian(4, 128) ** 15,
    ],
    ids=["huge", "subnormal", "subnormals", "offset", "bf16 steps", "outlier", "tiny outlier", "rank 1", "heavy tail"],
)
def test_quantize_of_extremes_is_finite_and_no_worse_than_the_mean(num_bits, weight):
    quantized = quantize(weight, num_bits, 128)
    assert quantized.scale.isfinite().all() and quantized.zero_point.isfinite().all()
    restored = restore(quantized, num_bits)
    assert restored.isfinite().all()
    exact = weight.double()
    mean = exact.mean(-1, keepdim=True)
    # A mean is stored to 11 bits, and nothing below the smallest normal number of bfloat16.
    stored = (mean.abs() * 2**-11 + 1.2e-38) ** 2
    error = (restored.double() - exact).square().mean(-1, keepdim=True)
    assert (error <= ((exact - mean).square().mean(-1, keepdim=True) + stored) * (1 + 1e-5)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", [lambda w: quantize(w, 3, 32), lambda w: quantization_mse(w, [3], 32)])
def test_quantize_refuses_what_is_not_finite(bad, function):
    weight = gaussian(4096, 64)
    weight[1001, 7] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        function(weight)


@pytest.mark.parametrize(
    ("shape", "num_bits", "group_size", "message"),
    [
        ((4, 128), 0, 128, "num_bits"),
        ((4, 128), 9, 128, "num_bits"),
        ((4, 128), 3, 16, "group_size"),
        ((4, 96), 3, 64, "in_features=96 is not divisible"),
        ((128,), 3, 64, "weight"),
        ((0, 128), 3, 64, "weight"),
    ],
)
def test_quantize_refuses_what_the_format_lacks(shape, num_bits, group_size, message):
    for call in (quantize, lambda w, b, g: quantization_mse(w, [b], g)):
        with pytest.raises(ValueError, match=message):
            call(torch.ones(shape), num_bits, group_size)


def test_quantize_refuses_integers():
    with pytest.raises(ValueError, match="floating point"):
        quantize(torch.ones(4, 128, dtype=torch.int8), 3, 128)


@pytest.mark.parametrize(
    "weight",
    [
        gaussian(1500, 640),
        student_t5(1500, 640),
        gaussian(1500, 640) * gaussian(1500, 1, seed=1).mul(0.5).exp(),
        gaussian(1500, 640) * gaussian(1, 640, seed=1).mul(0.5).exp() + 0.1,
    ],
    ids=["gaussian", "heavy tail", "uneven rows", "uneven columns"],
)
def test_quantization_mse_of_a_sample_is_within_two_percent(weight):
    for num_bits, mse in zip((2, 4), quantization_mse(weight.bfloat16(), (2, 4), 64), strict=True):
        assert mse == pytest.approx(quantize(weight.bfloat16(), num_bits, 64).mse, rel=0.02)


def test_quantization_mse_of_a_small_matrix_is_that_of_quantize():
    weight = gaussian(60, 128)
    for num_bits, mse in zip((1, 3), quantization_mse(weight, [1, 3], 32), strict=True):
        assert mse == pytest.approx(quantize(weight, num_bits, 32).mse, rel=1e-9)


def test_quantization_mse_sees_rows_that_differ_from_constant_samples():
    weight = torch.ones(8192, 32)
    weight[::2] = gaussian(4096, 32)
    weight[1::2] = 0.5
    sampled_odd = quantization_mse(weight, [2], 32)[0]
    assert sampled_odd == pytest.approx(quantize(weight, 2, 32).mse, rel=0.02)


def test_quantization_mse_of_constants_is_zero():
    assert quantization_mse(torch.zeros(300, 128), [1, 4], 128) == [0, 0]
