"""GPTQ of one matrix: it beats rounding on the inputs it was given, and is rounding where inputs say nothing."""

import math
from itertools import pairwise

import pytest
import torch

from alphaq_vllm.format import matrix_tensors
from alphaq_vllm.packing import dequantize, grid_steps, unpack
from offline.quantizers.gptq import DAMPING, Feedback, blocks, feedback, gptq, sampling_share
from offline.quantizers.quantize import Quantized, quantize, scales_of


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens, features, seed=0):
    return gaussian(tokens, features, seed=seed) @ (
        gaussian(features, features, seed=1) * torch.linspace(1, 0.02, features)
    )


def restore(quantized, num_bits):
    return dequantize(quantized.packed, quantized.scale, quantized.grid, num_bits)


def damped_hessian(inputs):
    """What ``feedback`` factors, in float64."""
    hessian = (inputs.T @ inputs).double()
    hessian *= 1 - sampling_share(inputs, hessian.float())
    hessian.diagonal().copy_(inputs.double().square().sum(0))
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    return hessian


# Blocks of 512: one, one that is full, and several of which the last is not.
@pytest.mark.parametrize(("tokens", "features"), [(1, 96), (7, 96), (500, 96), (900, 512), (2000, 1408)])
def test_feedback_is_the_factor_of_the_damped_hessian(tokens, features):
    inputs = correlated(tokens, features)
    back = feedback(inputs, 32)
    factor, hessian = back.factor.double(), damped_hessian(inputs[:, back.order])
    assert torch.equal(factor, factor.triu())
    assert torch.equal(factor.diagonal(), torch.ones(features).double())
    error = (factor.T * back.costs.double()) @ factor - hessian
    assert float(error.norm() / hessian.norm()) < 1e-5


def test_feedback_ends_with_what_has_most_energy():
    """Whole groups, the columns of each in order of their own."""
    inputs = gaussian(50, 96)
    scales = torch.cat((torch.linspace(3, 2, 32), torch.linspace(0.1, 1, 32), torch.linspace(9, 7, 32)))
    inputs *= scales / inputs.square().mean(0).sqrt()
    order = [*range(32, 64), *reversed(range(32)), *reversed(range(64, 96))]
    assert feedback(inputs, 32).order.tolist() == order


def test_tokens_count_as_much_as_they_shall(monkeypatch):
    monkeypatch.setattr("offline.quantizers.gptq.sampling_share", lambda *_: 0.0)
    inputs, counts = correlated(300, 96), gaussian(300, seed=2).square()
    back, once = feedback(inputs, 32, counts), feedback(inputs * counts.sqrt()[:, None], 32)
    assert torch.equal(back.order, once.order)
    torch.testing.assert_close(back.factor, once.factor)
    torch.testing.assert_close(back.costs, once.costs)
    nothing = feedback(inputs, 32, torch.zeros(300))
    assert torch.equal(nothing.factor, torch.eye(96))


def test_gptq_leaves_each_column_no_more_than_its_grid_does():
    """Errors of a column and, through the factor, of those before it add up to what rounding it has left."""
    inputs, weight = correlated(400, 128), gaussian(9, 128)
    back = feedback(inputs, 32)
    quantized = gptq(weight, back, 4, 32, improvements=0)
    codes = unpack(quantized.packed, 4)[:, back.order]
    steps = quantized.scale.double() * grid_steps(quantized.grid).repeat_interleave(32, 1)[:, back.order]
    left = (weight - restore(quantized, 4)).double()[:, back.order] @ back.factor.double().T
    inside = (codes > 0) & (codes < 15)
    assert inside.float().mean() > 0.7
    assert (left.abs() <= steps / 2 * 1.001)[inside].all()


def test_feedback_damps_until_a_factor_exists():
    inputs = torch.full((3, 64), 1e18)
    assert feedback(inputs, 64).factor.isfinite().all()


def test_feedback_of_zeros_is_the_identity():
    assert torch.equal(feedback(torch.zeros(5, 32), 32).factor, torch.eye(32))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_feedback_refuses_what_is_not_finite(bad):
    inputs = gaussian(8, 32)
    inputs[3, 4] = bad
    with pytest.raises(ValueError, match="calibration: expected finite activations"):
        feedback(inputs, 32)


def no_feedback(features):
    """Of inputs that have nothing in common."""
    return Feedback(torch.arange(features), torch.eye(features), torch.ones(features))


@pytest.mark.parametrize("num_bits", range(1, 9))
@pytest.mark.parametrize("group_size", [32, 128])
def test_gptq_of_independent_inputs_is_the_data_free_result(num_bits, group_size):
    weight = gaussian(37, 256).bfloat16()
    calibrated = gptq(weight, no_feedback(256), num_bits, group_size, improvements=0)
    plain = quantize(weight, num_bits, group_size)
    assert torch.equal(calibrated.packed, plain.packed)
    assert torch.equal(calibrated.scale, plain.scale)
    assert torch.equal(calibrated.grid, plain.grid)
    assert calibrated.mse == pytest.approx(plain.mse, rel=1e-6)


def share_of_rounding(weight, inputs, others, num_bits, group_size):
    """The error of outputs for other inputs, by that of rounding."""
    calibrated = gptq(weight, feedback(inputs, group_size), num_bits, group_size)
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
    calibrated = gptq(weight, feedback(gaussian(1, 256), 128), 2, 128, improvements=0)
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

    shrunk = error(gptq(weight, feedback(inputs, 128), 2, 128))
    monkeypatch.setattr("offline.quantizers.gptq.sampling_share", lambda *_: 0.0)
    assert shrunk < 0.9 * error(gptq(weight, feedback(inputs, 128), 2, 128))
    assert shrunk < 1.03 * error(quantize(weight, 2, 128))


@pytest.mark.parametrize("num_bits", [2, 5])
def test_gptq_reports_the_error_of_the_format_s_tensors(num_bits):
    weight, inputs = gaussian(33, 192), correlated(300, 192)
    quantized = gptq(weight, feedback(inputs, 64), num_bits, 64)
    tensors = (quantized.packed, quantized.scale, quantized.grid)
    specs = matrix_tensors(33, 192, num_bits, 64).values()
    assert [(t.shape, t.dtype) for t in tensors] == [(torch.Size(s.shape), s.dtype) for s in specs]
    true = (restore(quantized, num_bits).double() - weight).square().mean().item()
    assert quantized.mse == pytest.approx(true, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 8])
def test_gptq_leaves_its_arguments_alone(rows):
    weight, back = gaussian(rows, 64), feedback(correlated(99, 64), 32)
    before = weight.clone(), back.order.clone(), back.factor.clone(), back.costs.clone()
    gptq(weight, back, 3, 32)
    assert all(map(torch.equal, (weight, back.order, back.factor, back.costs), before))


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
        gptq(weight, no_feedback(64), num_bits, 32)


@pytest.mark.parametrize("num_bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
def test_each_improvement_lowers_the_error_of_outputs(num_bits, group_size):
    inputs, weight = correlated(2000, 384), gaussian(70, 384)
    back, hessian = feedback(inputs, group_size), damped_hessian(inputs)

    def error(improvements):
        quantized = gptq(weight, back, num_bits, group_size, improvements)
        left = (restore(quantized, num_bits) - weight).double()
        assert quantized.mse == pytest.approx(float(left.square().mean()), rel=1e-5)
        return float(((left @ hessian) * left).sum())

    errors = [error(improvements) for improvements in (0, 1, 3)]
    # Grids of small groups have little to gain.
    assert all(later < {32: 1.001, 128: 1}[group_size] * before for before, later in pairwise(errors))
    assert errors[2] < {32: 0.999, 128: 0.97}[group_size] * errors[0]


def test_columns_that_are_moved_together_are_moved_as_one_group_after_another(monkeypatch):
    """Sums in another order decide a few codes."""
    weight, back = gaussian(40, 352), feedback(correlated(1000, 352), 32)
    pull = gaussian(352, 40, seed=5) / 8
    at_once = gptq(weight, back, 3, 32, pull=pull.clone())
    # Two groups at a time, and one that is left.
    monkeypatch.setattr("offline.quantizers.gptq._COLUMNS", 64)
    found = gptq(weight, back, 3, 32, pull=pull.clone())
    assert (found.grid == at_once.grid).float().mean() > 0.95
    assert found.mse == pytest.approx(at_once.mse, rel=1e-3)


def test_improvements_leave_groups_of_zeros_exact():
    weight = gaussian(9, 128)
    weight[:, 32:64] = 0
    quantized = gptq(weight, no_feedback(128), 3, 32)
    assert not restore(quantized, 3)[:, 32:64].any()


@pytest.mark.parametrize(
    ("tokens", "features", "expected"),
    [
        (2048, 2048, [2048]),
        (2047, 2048, [1024, 1024]),
        (8192, 14336, [3584] * 4),
        (3, 1408, [512, 512, 384]),
        (0, 64, [64]),
    ],
)
def test_columns_of_fewer_tokens_than_features_are_in_blocks(tokens, features, expected):
    found = blocks(tokens, features, 64)
    assert [columns.stop - columns.start for columns in found] == expected
    assert [columns.start for columns in found] == [0, *(columns.stop for columns in found[:-1])]


def test_parts_of_columns_are_joined_to_the_matrix():
    weight = gaussian(20, 256)
    scales = scales_of(weight, 3, 64)
    parts = [
        gptq(weight[:, columns], feedback(correlated(99, 128), 64), 3, 64, scales=scales)
        for columns in (slice(0, 128), slice(128, 256))
    ]
    joined = Quantized.joined(parts)
    assert torch.equal(joined.scale, scales)
    found = restore(joined, 3)
    assert torch.equal(found, torch.cat([restore(part, 3) for part in parts], 1))
    assert joined.mse == pytest.approx(float((found - weight).square().mean()), rel=1e-5)
