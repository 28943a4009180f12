"""The data-free quantizers beside the default one: their errors as published, and what all of them promise."""

import pytest
import torch

from alphaq_vllm.packing import grid_steps
from offline.operations.compare import greatest_mse
from offline.quantizers.grids import GRIDS
from offline.quantizers.quantize import quantization_mse, quantize
from tests.offline.quantizers.samples import gaussian, restore, student_t5


# Normalised errors of independent implementations with unlimited grids, rtn with an integer and hqq with a float zero
# point.
@pytest.mark.parametrize(
    ("quantizer", "sample", "num_bits", "expected"),
    [
        ("rtn", gaussian, 2, 0.253),
        ("rtn", gaussian, 3, 0.046),
        ("rtn", gaussian, 4, 0.0101),
        ("rtn", student_t5, 2, 0.357),
        ("rtn", student_t5, 3, 0.081),
        ("rtn", student_t5, 4, 0.0177),
        ("hqq", gaussian, 2, 0.241),
        ("hqq", gaussian, 3, 0.043),
        ("hqq", gaussian, 4, 0.0093),
        ("hqq", student_t5, 2, 0.386),
        ("hqq", student_t5, 3, 0.076),
        ("hqq", student_t5, 4, 0.0163),
        ("mse", gaussian, 2, 0.112),
        ("mse", gaussian, 3, 0.033),
        ("mse", student_t5, 2, 0.173),
        ("mse", student_t5, 3, 0.057),
    ],
)
def test_quantize_has_the_error_of_its_quantizer(quantizer, sample, num_bits, expected):
    weight = sample(512, 1024)
    assert quantize(weight, num_bits, 128, quantizer).mse / weight.var().item() == pytest.approx(expected, rel=0.12)


def test_rtn_spans_the_range():
    weight = gaussian(32, 256)
    quantized = quantize(weight, 4, 64, "rtn")
    step = (quantized.scale.float() * grid_steps(quantized.grid))[..., None]
    groups = weight.view(32, 4, 64)
    equal = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    assert ((step - equal).abs() <= quantized.scale.float()[..., None]).all()
    error = (restore(quantized, 4) - weight).view_as(groups).abs()
    # Half a step, and what the coarse step and zero point leave outside the grid.
    assert (error <= 1.3 * step).all()


def test_hqq_is_nearer_than_rtn():
    weight = student_t5(64, 128)
    assert quantize(weight, 3, 128, "hqq").mse < quantize(weight, 3, 128, "rtn").mse


@pytest.mark.parametrize("quantizer", GRIDS)
@pytest.mark.parametrize("num_bits", [2, 3, 8])
def test_quantize_reports_the_error_of_what_is_stored(quantizer, num_bits):
    weight = (gaussian(24, 256) * gaussian(24, 1, seed=1).exp() + 0.3).bfloat16()
    quantized = quantize(weight, num_bits, 64, quantizer)
    true = (restore(quantized, num_bits).double() - weight.double()).square().mean().item()
    assert quantized.mse == pytest.approx(true, rel=1e-4)


@pytest.mark.parametrize("quantizer", GRIDS)
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_quantize_follows_the_scale_of_the_weights(quantizer, scale):
    weight = student_t5(8, 128)
    scaled, plain = quantize(weight * scale, 3, 128, quantizer), quantize(weight, 3, 128, quantizer)
    assert torch.equal(scaled.packed, plain.packed)


@pytest.mark.parametrize("quantizer", GRIDS)
@pytest.mark.parametrize("num_bits", [1, 3, 8])
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(2, 128),
        torch.full((2, 128), 3e38) * torch.tensor([1.0, -1.0]).repeat(64),
        gaussian(4, 128) * 1e-42,
        1e4 + gaussian(4, 128) * 1e-3,
        torch.zeros(2, 128).index_fill_(1, torch.tensor([5]), 1e30),
        gaussian(4, 128) ** 15,
    ],
    ids=["zero", "huge", "subnormals", "offset", "outlier", "heavy tail"],
)
def test_quantize_of_extremes_is_finite_and_within_a_step(quantizer, num_bits, weight):
    quantized = quantize(weight, num_bits, 128, quantizer)
    assert quantized.scale.isfinite().all()
    error = (restore(quantized, num_bits).double() - weight.double()).square().mean()
    assert error <= greatest_mse(weight, num_bits, 128) + 1.2e-38**2


@pytest.mark.parametrize("quantizer", GRIDS)
def test_quantization_mse_is_that_of_the_quantizer(quantizer):
    weight = student_t5(1500, 640)
    for num_bits, mse in zip((2, 4), quantization_mse(weight, (2, 4), 64, quantizer), strict=True):
        assert mse == pytest.approx(quantize(weight, num_bits, 64, quantizer).mse, rel=0.02)


@pytest.mark.parametrize("function", [lambda w, q: quantize(w, 3, 32, q), lambda w, q: quantization_mse(w, [3], 32, q)])
def test_quantize_refuses_an_unknown_quantizer(function):
    with pytest.raises(ValueError, match="quantizer: expected one of mse, rtn, hqq, got 'awq'"):
        function(gaussian(4, 64), "awq")
