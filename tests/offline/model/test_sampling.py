"""Tokens drawn from predictions, against the cumulated probabilities in float64."""

import pytest
import torch

from offline.model import sampling
from offline.model.sampling import draw

WORDS, FEATURES, PLACES = 1000, 16, 50


def make(draws=20, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    places = torch.randn(PLACES, FEATURES, generator=generator) * spread
    head = torch.randn(WORDS, FEATURES, generator=generator).bfloat16()
    return places, torch.rand(PLACES, draws, dtype=torch.float64, generator=generator), head


def probabilities(places, head, bias=None, scaling=1.0):
    logits = places.double() @ head.double().T
    return ((logits if bias is None else logits + bias.double()) / scaling).softmax(-1)


@pytest.mark.parametrize("words", [1000, 896, 100, 1])
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_a_token_is_the_first_whose_cumulated_probability_exceeds_the_share(words, spread, monkeypatch):
    monkeypatch.setattr(sampling, "MAX_PREDICTIONS", 7 * 1024)
    monkeypatch.setattr(sampling, "SLICE", 256)
    places, shares, head = make(spread=spread)
    bias = torch.linspace(-1, 1, words)
    tokens = draw(places, shares, head[:words], bias, 2.0)
    ends = probabilities(places, head[:words], bias, 2.0).cumsum(-1)
    ends[:, -1] = 1
    expected = torch.searchsorted(ends, shares, right=True)
    assert tokens.shape == shares.shape
    assert (tokens == expected).double().mean() > 0.995
    assert (tokens - expected).abs().max() <= 1


def test_no_share_gives_a_token_that_cannot_follow():
    places, _, head = make()
    bias = torch.full((WORDS,), -1e4)
    bias[[0, 300, 998]] = 0.0
    ends = torch.tensor([0.0, 1e-300, 0.5, 1 - 2**-53], dtype=torch.float64).expand(PLACES, -1)
    assert set(draw(places, ends, head, bias).unique().tolist()) <= {0, 300, 998}


@pytest.mark.parametrize("workers", [2, 5])
def test_the_number_of_threads_changes_no_token(workers, monkeypatch):
    monkeypatch.setattr(sampling, "SLICE", 128)
    places, shares, head = make()
    assert torch.equal(draw(places, shares, head), draw(places, shares, head, workers=workers))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_are_refused(value):
    places, shares, head = make()
    places[3, 2] = value
    with pytest.raises(FloatingPointError):
        draw(places, shares, head)
