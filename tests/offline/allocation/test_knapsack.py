"""Allocation: optimal where brute force can tell, a proven gap where it cannot, and the choice of gamma."""

import itertools
import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offline.allocation.knapsack import allocate, auto_gamma, importance

# Normalized error of the quantizer on Gaussian weights at 1 to 8 bits.
NOISE = np.array([0.353, 0.109, 0.031, 0.0082, 0.0020, 0.00049, 0.00012, 3.1e-5])


def realistic(num_matrices, widths, gamma, sizes):
    rng = np.random.default_rng(0)
    alphas = np.exp(rng.normal(1.2, 0.1, num_matrices))
    numel = rng.choice(np.array(sizes), num_matrices)
    noise = rng.lognormal(-7, 0.5, (num_matrices, 1)) * NOISE[np.array(widths) - 1]
    noise *= rng.lognormal(0, 0.05, noise.shape)
    return importance(alphas, gamma)[:, None] * noise * numel[:, None], numel


def brute_force(costs, numel, widths, average_bits):
    budget = Fraction(str(average_bits)) * int(numel.sum())
    return min(
        sum(costs[i, w] for i, w in enumerate(choice))
        for choice in itertools.product(range(len(widths)), repeat=len(costs))
        if sum(int(numel[i]) * widths[w] for i, w in enumerate(choice)) <= budget
    )


@st.composite
def problems(draw):
    widths = sorted(draw(st.sets(st.integers(1, 8), min_size=1, max_size=4)))
    cost = st.one_of(st.floats(0, 1e3, allow_subnormal=False), st.integers(0, 3).map(float))
    rows = draw(st.lists(st.tuples(*[cost] * len(widths)), min_size=1, max_size=5))
    numel = draw(st.lists(st.integers(1, 30), min_size=len(rows), max_size=len(rows)))
    tenths = draw(st.integers(10 * widths[0], 10 * widths[-1]))
    return np.array(rows), np.array(numel), widths, tenths / 10


@settings(max_examples=300, deadline=None)
@given(problems())
def test_allocate_is_optimal_on_small_problems(problem):
    costs, numel, widths, average_bits = problem
    allocation = allocate(*problem)
    columns = [widths.index(b) for b in allocation.bits]
    best = brute_force(*problem)
    assert allocation.cost == pytest.approx(best, rel=1e-9, abs=1e-300)
    assert allocation.cost == pytest.approx(sum(row[w] for row, w in zip(costs, columns, strict=True)))
    assert int((allocation.bits * numel).sum()) <= Fraction(str(average_bits)) * int(numel.sum())
    assert allocation.lower_bound <= best * (1 + 1e-9)
    assert allocation.average_bits == pytest.approx((allocation.bits * numel).sum() / numel.sum())


@pytest.mark.parametrize("widths", [[2, 3, 4], [1, 2, 3, 4], [2, 3, 4, 8], list(range(1, 9))], ids=str)
@pytest.mark.parametrize(
    "sizes", [[1408 * 2048], [1408 * 2048, 2048 * 512, 7168 * 2048, 333 * 128]], ids=["equal", "mixed"]
)
@pytest.mark.parametrize(("gamma", "average_bits"), [(0, 2.5), (12, 3.5), (100, 3.33)])
def test_allocate_of_45000_matrices_is_fast_and_tight(widths, sizes, gamma, average_bits):
    costs, numel = realistic(45_000, widths, gamma, sizes)
    start = time.process_time()
    allocation = allocate(costs, numel, widths, average_bits)
    # Usually less than one; what grows with the square of the matrices takes an hour.
    assert time.process_time() - start < 30
    assert 0 <= allocation.gap < 1e-5
    assert allocation.gap == pytest.approx((allocation.cost - allocation.lower_bound) / allocation.cost, abs=1e-12)
    assert allocation.average_bits <= average_bits


@pytest.mark.parametrize("scale", [1e-12, 1e12, 1e-100, 1e100])
def test_allocate_does_not_depend_on_the_scale_of_costs(scale):
    costs, numel = realistic(500, [2, 3, 4], 12, [1408 * 2048, 2048 * 512])
    np.testing.assert_array_equal(
        allocate(costs * scale, numel, [2, 3, 4], 3.1).bits, allocate(costs, numel, [2, 3, 4], 3.1).bits
    )


@pytest.mark.parametrize("width", [2, 4])
def test_allocate_of_an_extreme_budget_is_the_only_answer(width):
    costs, numel = realistic(50, [2, 3, 4], 0, [7, 11])
    assert allocate(costs, numel, [2, 3, 4], width).bits.tolist() == [width] * 50


def test_allocate_leaves_bits_that_do_not_help():
    allocation = allocate(np.array([[1.0, 0.5, 0.7]] * 9), np.ones(9), [2, 3, 4], 4)
    assert allocation.bits.tolist() == [3] * 9
    assert allocation.gap == 0


def test_allocate_spends_a_decimal_budget_to_the_last_bit():
    # 3.3 as a float is a little less than 33/10.
    allocation = allocate(np.array([[1.0, 0.1]] * 10), np.ones(10), [3, 4], 3.3)
    assert allocation.bits.tolist() == [4] * 3 + [3] * 7


def test_allocate_weights_the_budget_by_numel():
    allocation = allocate(np.array([[1.0, 0.0], [1.5, 0.0]]), np.array([1, 3]), [2, 4], 2.5)
    assert allocation.bits.tolist() == [4, 2]
    assert allocation.average_bits == 2.5


def test_allocate_steps_over_a_width_above_the_hull():
    # Of 2 and 3 bits neither helps alone; from 2 to 4 does.
    allocation = allocate(np.array([[1.0, 0.99, 0.0], [1.0, 0.99, 0.0]]), np.ones(2), [2, 3, 4], 3)
    assert sorted(allocation.bits.tolist()) == [2, 4]


def test_allocate_of_zero_costs_has_no_gap():
    assert allocate(np.zeros((3, 2)), np.ones(3), [2, 3], 2.5).gap == 0


@pytest.mark.parametrize("average_bits", [1.9, 4.1, 16])
def test_allocate_refuses_a_budget_outside_the_widths(average_bits):
    with pytest.raises(ValueError, match=r"expected 2 to 4.*`candidate_bits`"):
        allocate(np.ones((2, 3)), np.ones(2), [2, 3, 4], average_bits)


@pytest.mark.parametrize("average_bits", [math.nan, math.inf, 0, -3])
def test_allocate_refuses_a_budget_that_is_no_positive_number(average_bits):
    with pytest.raises(ValueError, match=r"average_bits: expected a positive number.*`bits`"):
        allocate(np.ones((2, 3)), np.ones(2), [2, 3, 4], average_bits)


@pytest.mark.parametrize("widths", [[2, 3, 9], [0, 2, 3], [3, 2, 4], [2, 2, 3]])
def test_allocate_refuses_unsupported_widths(widths):
    with pytest.raises(ValueError, match=r"widths: expected.*`candidate_bits`"):
        allocate(np.ones((2, 3)), np.ones(2), widths, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-9])
def test_allocate_refuses_a_cost_that_is_no_cost(bad):
    costs = np.ones((3, 2))
    costs[1, 1] = bad
    with pytest.raises(ValueError, match="for matrix 1"):
        allocate(costs, np.ones(3), [2, 3], 2.5)


@pytest.mark.parametrize(("shape", "numel"), [((2, 3), [1, 1]), ((3, 2), [1, 1]), ((0, 2), [])])
def test_allocate_refuses_shapes_that_disagree(shape, numel):
    with pytest.raises(ValueError, match="costs: expected shape"):
        allocate(np.ones(shape), np.array(numel), [2, 3], 2.5)


def test_allocate_refuses_an_empty_matrix():
    with pytest.raises(ValueError, match="numel: expected positive"):
        allocate(np.ones((2, 2)), np.array([4, 0]), [2, 3], 2.5)


def test_importance_is_the_power_of_the_ratio_to_the_median():
    np.testing.assert_allclose(importance(np.array([2.0, 4.0, 8.0]), 3), [8, 1, 0.125])
    np.testing.assert_array_equal(importance(np.array([2.0, 4.0, 8.0]), 0), np.ones(3))


def test_importance_never_overflows_or_vanishes():
    weights = importance(np.array([1.07, 5.0, 100.0]), 1e6)
    assert np.isfinite(weights).all() and (weights > 0).all() and (np.diff(weights) < 0).all()


@pytest.mark.parametrize("alpha", [math.nan, math.inf, 0.0, -2.0])
def test_importance_refuses_an_alpha_that_is_no_exponent(alpha):
    with pytest.raises(ValueError, match="alphas"):
        importance(np.array([3.0, alpha]), 1)


@pytest.mark.parametrize("gamma", [math.nan, math.inf, -1.0])
def test_importance_refuses_an_impossible_gamma(gamma):
    with pytest.raises(ValueError, match="`gamma=auto`"):
        importance(np.array([3.0, 4.0]), gamma)


def alphas_of_spread(spread):
    return 4 * np.exp(spread * np.array([-1.0, 1.0] * 50))


@pytest.mark.parametrize(("spread", "best"), [(0.1, 12), (0.086, 14), (0.006, 200)])
def test_auto_gamma_meets_the_papers_best(spread, best):
    assert best / 1.5 < auto_gamma(alphas_of_spread(spread)) < best * 1.5


def test_auto_gamma_is_bounded_where_alphas_hardly_differ():
    assert auto_gamma(alphas_of_spread(1e-9)) == 400


@pytest.mark.parametrize("alphas", [[5.0], [4.1] * 7, [100.0] * 3])
def test_auto_gamma_without_spread_is_zero(alphas):
    assert auto_gamma(np.array(alphas)) == 0


def test_auto_gamma_falls_with_the_noise_of_alpha():
    gammas = [auto_gamma(alphas_of_spread(0.1), noise) for noise in (0.0, 0.0, 0.02, 0.08, 0.11, 0.2)]
    assert gammas[0] == gammas[1] == pytest.approx(12)
    assert gammas[0] > gammas[2] > gammas[3] > gammas[4] == gammas[5] == 0


@pytest.mark.parametrize("spread", [0.011, 0.014, 0.02, 0.1])
def test_auto_gamma_is_bounded_by_the_noise_of_alpha(spread):
    assert auto_gamma(alphas_of_spread(spread), 0.01) <= 0.6 / 0.01 * (1 + 1e-9)
