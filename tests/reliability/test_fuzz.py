"""The corpus, and mutations of it, through every target."""

from math import inf

import pytest

from tests.reliability import fuzz, targets
from tests.reliability.targets import TARGETS, accepts

INPUTS = 3000


@pytest.fixture(scope="module", autouse=True)
def closed():
    yield
    targets.close()


@pytest.mark.parametrize("target", TARGETS)
def test_target_accepts_or_refuses_every_input(target):
    counts = fuzz.fuzz(target, inf, INPUTS)
    # Mutations that are all refused, or all accepted, would try nothing.
    assert counts[False] > INPUTS / 10
    assert counts[True] > INPUTS / 1000


@pytest.mark.parametrize("target", TARGETS)
def test_target_accepts_what_is_whole(target):
    assert accepts(target, (fuzz.CORPUS / target / "whole").read_bytes())


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_target_accepts_or_refuses_150000_inputs(target):
    assert fuzz.fuzz(target, inf, 150_000, seed=1).total() == 150_000


def test_fuzz_finds_a_bug(monkeypatch):
    """A target that fails on a byte that the corpus lacks."""

    def fail(data):
        if b"\0\0\0" in data:
            raise KeyError("bug")

    monkeypatch.setitem(TARGETS, "spec", fail)
    with pytest.raises(AssertionError, match=r"spec: KeyError\('bug'\) for the input"):
        fuzz.fuzz("spec", inf, 100_000)


def test_fuzz_repeats_with_the_same_seed():
    first, again, other = (fuzz.inputs("spec", seed) for seed in (1, 1, 2))
    first, again, other = ([next(stream) for _ in range(100)] for stream in (first, again, other))
    assert first == again != other
