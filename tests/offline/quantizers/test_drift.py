"""What down makes up for: what quantized gate and up make of their inputs."""

import pytest
import torch

from alphaq_vllm.packing import dequantize
from offline.quantizers import drift as module
from offline.quantizers.drift import drift, pull
from offline.quantizers.gptq import feedback, gptq
from tests.offline.quantizers.test_gptq import correlated, gaussian


def changed(tokens, features, strength=0.3):
    """Inputs as they were and as they are: with noise of their own, and with something of each other."""
    before = correlated(tokens, features)
    mixing = torch.eye(features) + strength * gaussian(features, features, seed=3) / features**0.5
    return before, before @ mixing + strength * gaussian(tokens, features, seed=4)


def drifted(before, now, counts=None):
    return drift(now, lambda some: before[some], torch.ones(len(now)) if counts is None else counts)


@pytest.fixture
def believing(monkeypatch):
    """No sample is shrunk, nor doubted, so that all is as the formula says."""
    monkeypatch.setattr(module, "_UNCHANGED", 0)
    monkeypatch.setattr(module, "share_of_chance", lambda *_: 0.0)
    monkeypatch.setattr("offline.quantizers.gptq.sampling_share", lambda *_: 0.0)


# More tokens than are looked at together.
def test_drift_is_the_product_of_differences_and_inputs(believing):
    before, now = changed(5000, 96)
    counts = gaussian(5000, seed=5).square()
    expected = (before - now).double().T @ (counts[:, None] * now).double()
    torch.testing.assert_close(drifted(before, now, counts).double(), expected, rtol=1e-4, atol=1e-2)


def test_drift_of_fewer_tokens_than_features_is_what_became_of_each(believing, monkeypatch):
    before, now = changed(90, 96)
    expected = ((before - now) * now).double().sum(0)
    torch.testing.assert_close(drifted(before, now).double(), expected, rtol=1e-4, atol=1e-3)
    # Some of the tokens, for all.
    monkeypatch.setattr(module, "FEW", 40)
    counts, some = gaussian(90, seed=5).square(), slice(0, 90, 3)
    expected = counts[some] @ ((before - now) * now)[some] * counts.sum() / counts[some].sum()
    torch.testing.assert_close(drifted(before, now, counts), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("tokens", "strength"), [(20, 0.3), (200, 0.3), (2000, 1.0)])
def test_drift_is_shrunk_by_the_variance_of_its_correlations_by_their_squares(tokens, strength):
    before, now = changed(tokens, 16, strength)
    differences, inputs = (before - now).double(), now.double()
    differences /= differences.square().mean(0).sqrt()
    inputs /= inputs.square().mean(0).sqrt()
    products = differences[:, :, None] * inputs[:, None, :]
    correlations = products.mean(0)
    variances = (products - correlations).square().sum(0) / (tokens * (tokens - 1))
    others, trust = ~torch.eye(16, dtype=bool), tokens / (tokens + 8)
    share = min(1.0, float(variances[others].sum() / correlations[others].square().sum()))
    whole, found = trust * (before - now).T @ now, drifted(before, now)
    assert 0 < share < 1
    torch.testing.assert_close(found[others], (1 - share) * whole[others], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.diagonal(), whole.diagonal(), rtol=1e-4, atol=1e-3)


def test_of_few_tokens_less_is_believed():
    before, now = changed(2000, 96)
    for tokens, counts, number in ((1, 1.0, 1), (50, 2.0, 50), (2000, 1.0, 2000), (50, [5.0] + [0.0] * 49, 1)):
        past, present, counts = before[:tokens], now[:tokens], torch.as_tensor(counts).expand(tokens)
        found = drifted(past, present, counts)
        expected = counts @ ((past - present) * present) * number / (number + 8)
        torch.testing.assert_close(found if found.ndim == 1 else found.diagonal(), expected, rtol=1e-4, atol=1e-3)


# Either way of it.
@pytest.mark.parametrize("tokens", [60, 3000])
def test_features_and_tokens_that_are_nothing_change_nothing(tokens, monkeypatch):
    before, now = changed(tokens, 96)
    now[:, 7] = before[:, 8] = 0
    assert drifted(before, now).isfinite().all()
    assert not drifted(before, now, torch.zeros(tokens)).any()
    assert not drifted(now, now).any()
    # Nor do those that happen to be the ones looked at.
    monkeypatch.setattr(module, "FEW", 40)
    found = drifted(before, now, torch.arange(tokens) % -(-tokens // 40) / 1.0)
    assert found.isfinite().all()
    assert found.any() == (tokens > 96)


@pytest.mark.parametrize("tokens", [60, 3000])
@pytest.mark.parametrize("times", [2.0**-40, 2.0**34])
def test_drift_follows_the_size_of_inputs(tokens, times):
    before, now = changed(tokens, 96)
    found, expected = drifted(before * times, now * times) / times**2, drifted(before, now)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("tokens", [60, 3000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_drift_refuses_what_is_not_finite(tokens, bad):
    before, now = changed(tokens, 96)
    before[3, 4] = bad
    with pytest.raises(ValueError, match="calibration: expected finite activations"):
        drifted(before, now)


@pytest.mark.parametrize("whole", [True, False])
def test_pull_completes_the_square(whole, believing, monkeypatch):
    """``E @ H @ E.T + 2 * E @ drifted.T @ weight.T`` is the sum of squares but for what no E changes."""
    # In pieces, with a smaller one at the end.
    monkeypatch.setattr(module, "_ROWS", 36)
    before, now = changed(2000, 96)
    weight, back = gaussian(5, 96), feedback(now, 32)
    found = drifted(before, now)
    found = found if whole else found.diagonal()
    moved = pull(weight, back, found)
    found = found if whole else found.diag()
    factor, costs = back.factor.double(), back.costs.double()

    def both(errors):
        ordered = errors[:, back.order].double()
        products = (factor.T * costs) @ factor
        one = (ordered @ products * ordered).sum() + 2 * (errors.double() @ found.T.double() * weight).sum()
        return float(one), float((costs[:, None] * (factor @ ordered.T + moved.double()).square()).sum())

    (first, other), (nothing, constant) = both(gaussian(5, 96, seed=9)), both(torch.zeros(5, 96))
    assert nothing == 0
    assert other - constant == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("num_bits", [2, 3, 8])
@pytest.mark.parametrize("tokens", [200, 20_000])
def test_outputs_are_nearer_to_what_they_were(num_bits, tokens):
    """Also those for other tokens, and with the diagonal alone."""
    (before, now), weight = changed(tokens + 2000, 256), gaussian(70, 256)
    past, present = before[:tokens], now[:tokens]
    back = feedback(present, 128)

    def error(quantized):
        outputs = now[tokens:] @ dequantize(quantized.packed, quantized.scale, quantized.grid, num_bits).T
        return float((outputs - before[tokens:] @ weight.T).square().mean())

    plain = gptq(weight, back, num_bits, 128)
    better = gptq(weight, back, num_bits, 128, pull=pull(weight, back, drifted(past, present)))
    assert error(better) < (0.9 if tokens > 256 else 0.98) * error(plain)


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_few_tokens_do_next_to_no_harm(tokens):
    """Without doubt, what one token shows makes errors half as large again, and more."""
    ratios, both = [], changed(2400, 256, 0.5)
    for first in range(0, 400, 40):
        (before, now), weight = both, gaussian(70, 256)
        some = slice(first, first + tokens)
        back = feedback(now[some], 128)

        def error(quantized):
            outputs = now[400:] @ dequantize(quantized.packed, quantized.scale, quantized.grid, 3).T  # noqa: B023
            return float((outputs - before[400:] @ weight.T).square().mean())  # noqa: B023

        better = gptq(weight, back, 3, 128, pull=pull(weight, back, drifted(before[some], now[some])))
        ratios.append(error(better) / error(gptq(weight, back, 3, 128)))
    assert sum(ratios) / len(ratios) < 1.02
