"""GPTQ of one matrix: it beats rounding on the inputs it was given, and is rounding where inputs say nothing."""

import math

import pytest
import torch

from alphaq_vllm.format import matrix_tensors
from alphaq_vllm.packing import dequantize
from offline.quantizers.gptq import DAMPING, gptq, inverse_factor, sampling_share
from offline.quantizers.quantize import quantize


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens, features, seed=0):
    return gaussian(tokens, features, seed=seed) @ (
        gaussian(features, features, seed=1) * torch.linspace(1, 0.02, features)
    )


def restore(quantized, num_bits):
    return dequantize(quantized.packed, quantized.scale, quantized.zero_point, num_bits)


@pytest.mark.parametrize("tokens", [1, 7, 500])
def test_inverse_factor_is_that_of_the_damped_hessian(tokens):
    inputs = correlated(tokens, 96)
    products = inputs.T @ inputs
    hessian = (products * (1 - sampling_share(inputs, products))).double()
    hessian.diagonal().copy_(products.diagonal())
    hessian += torch.eye(96) * DAMPING * hessian.diagonal().mean()
    factor = inverse_factor(inputs).double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ hessian, torch.eye(96).double(), rtol=0, atol=0.01)


def test_inverse_factor_damps_until_a_factor_exists():
    inputs = torch.full((3, 64), 1e18)
    assert inverse_factor(inputs).isfinite().all()


def test_inverse_factor_of_zeros_is_the_identity():
    assert torch.equal(inverse_factor(torch.zeros(5, 32)), torch.eye(32))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_inverse_factor_refuses_what_is_not_finite(bad):
    inputs = gaussian(8, 32)
    inputs[3, 4] = bad
    with pytest.raises(ValueError, match="calibration: expected finite activations"):
        inverse_factor(inputs)


@pytest.mark.parametrize("num_bits", range(1, 9))
@pytest.mark.parametrize("group_size", [32, 128])
def test_gptq_of_independent_inputs_is_the_data_free_result(num_bits, group_size):
    weight = gaussian(37, 256).bfloat16()
    calibrated = gptq(weight, torch.eye(256), num_bits, group_size)
    plain = quantize(weight, num_bits, group_size)
    assert torch.equal(calibrated.packed, plain.packed)
    assert torch.equal(calibrated.scale, plain.scale)
    assert torch.equal(calibrated.zero_point, plain.zero_point)
    assert calibrated.mse == pytest.approx(plain.mse, rel=1e-6)


def share_of_rounding(weight, inputs, others, num_bits, group_size):
    """The error of outputs for other inputs, by that of rounding."""
    calibrated = gptq(weight, inverse_factor(inputs), num_bits, group_size)
    error, rounded = (
        ((restore(quantized, num_bits) - weight) @ others.T).square().mean()
        for quantized in (calibrated, quantize(weight, num_bits, group_size))
    )
    return error / rounded


@pytest.mark.parametrize(("num_bits", "share"), [(1, 0.8), (2, 0.5), (3, 0.4), (4, 0.4)])
@pytest.mark.parametrize("group_size", [64, 128])
def test_gptq_changes_outputs_less_than_rounding(num_bits, share, group_size, monkeypatch):
    # The outputs for its own inputs, which are all that there is here.
    monkeypatch.setattr("offline.quantizers.gptq.sampling_share", lambda *_: 0.0)
    inputs = correlated(2000, 384)
    assert share_of_rounding(gaussian(70, 384), inputs, inputs, num_bits, group_size) < share


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_gptq_changes_outputs_for_other_inputs_less_than_rounding(num_bits):
    inputs, others = correlated(20_000, 384), correlated(2000, 384, seed=2)
    assert share_of_rounding(gaussian(70, 384), inputs, others, num_bits, 128) < 0.5


def test_gptq_with_a_single_token_is_the_data_free_result():
    weight = gaussian(70, 256)
    calibrated = gptq(weight, inverse_factor(gaussian(1, 256)), 2, 128)
    assert torch.equal(calibrated.packed, quantize(weight, 2, 128).packed)


@pytest.mark.parametrize(("tokens", "strength"), [(20, 0), (200, 1), (2000, 1), (2000, 0.1)])
def test_sampling_share_is_the_variance_of_correlations_by_their_squares(tokens, strength):
    inputs = gaussian(tokens, 48) + strength * gaussian(tokens, 1, seed=1)
    scaled = inputs.double() / inputs.double().square().mean(0).sqrt()
    products = scaled[:, :, None] * scaled[:, None, :]
    correlations = products.mean(0)
    variances = (products - correlations).square().sum(0) / (tokens * (tokens - 1))
    others = ~torch.eye(48, dtype=bool)
    expected = float(variances[others].sum() / correlations[others].square().sum())
    assert sampling_share(inputs, inputs.T @ inputs) == pytest.approx(min(1, expected), rel=1e-4)


def test_sampling_share_does_not_depend_on_the_scale_of_features_and_knows_features_without_values():
    inputs = correlated(99, 64)
    inputs[:, :32] *= 1e6
    inputs[:, 50] = 0
    share = sampling_share(inputs, inputs.T @ inputs)
    used = torch.cat((inputs[:, :32] / 1e6, inputs[:, 32:50], inputs[:, 51:]), 1)
    assert 0 < share < 1
    assert share == pytest.approx(sampling_share(used, used.T @ used), rel=1e-4)
    assert sampling_share(torch.zeros(9, 8), torch.zeros(8, 8)) == 1


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_gptq_of_few_tokens_holds_for_others(strength, monkeypatch):
    mixing = torch.eye(256) + strength * gaussian(256, 256, seed=1) / 16
    weight, inputs, others = gaussian(70, 256), gaussian(256, 256) @ mixing, gaussian(4096, 256, seed=2) @ mixing

    def error(quantized):
        return float(((restore(quantized, 2) - weight) @ others.T).square().mean())

    shrunk = error(gptq(weight, inverse_factor(inputs), 2, 128))
    monkeypatch.setattr("offline.quantizers.gptq.sampling_share", lambda *_: 0.0)
    assert shrunk < 0.9 * error(gptq(weight, inverse_factor(inputs), 2, 128))
    assert shrunk < 1.03 * error(quantize(weight, 2, 128))


@pytest.mark.parametrize("num_bits", [2, 5])
def test_gptq_reports_the_error_of_the_format_s_tensors(num_bits):
    weight, inputs = gaussian(33, 192), correlated(300, 192)
    quantized = gptq(weight, inverse_factor(inputs), num_bits, 64)
    tensors = (quantized.packed, quantized.scale, quantized.zero_point)
    specs = matrix_tensors(33, 192, num_bits, 64).values()
    assert [(t.shape, t.dtype) for t in tensors] == [(torch.Size(s.shape), s.dtype) for s in specs]
    true = (restore(quantized, num_bits).double() - weight).square().mean().item()
    assert quantized.mse == pytest.approx(true, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 8])
def test_gptq_leaves_its_arguments_alone(rows):
    weight, factor = gaussian(rows, 64), inverse_factor(correlated(99, 64))
    before = weight.clone(), factor.clone()
    gptq(weight, factor, 3, 32)
    assert torch.equal(weight, before[0]) and torch.equal(factor, before[1])


@pytest.mark.parametrize(
    ("weight", "num_bits", "message"),
    [
        (torch.full((4, 64), math.nan), 3, "NaN or Inf"),
        (torch.ones(4, 64), 9, "num_bits"),
        (torch.ones(4, 48), 3, "in_features=48 is not divisible"),
    ],
)
def test_gptq_refuses_what_the_format_lacks(weight, num_bits, message):
    with pytest.raises(ValueError, match=message):
        gptq(weight, torch.eye(weight.shape[1]), num_bits, 32)


@pytest.mark.parametrize("in_features", [64, 512, 1408])
def test_inverse_factor_is_that_of_the_damped_matrix_of_any_size(in_features):
    """Blocks of 512: one, one that is full, and several of which the last is not."""
    inputs = gaussian(2000, in_features)
    factor = inverse_factor(inputs).double()
    products = (inputs.T @ inputs).double()
    products *= 1 - sampling_share(inputs, products.float())
    products.diagonal().copy_(inputs.double().square().sum(0))
    products.diagonal().add_(DAMPING * products.diagonal().mean())
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ products, torch.eye(in_features).double(), rtol=0, atol=1e-3)
