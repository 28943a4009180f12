"""The modes of choosing widths: what each gives, and that all keep to the budget."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offline.allocation import modes
from offline.allocation.bit_map import average_bits
from offline.allocation.widths import Budget, choose
from offline.sensitivity.matrices import MatrixStats

NUMEL = {"gate_proj": 4096, "up_proj": 4096, "down_proj": 4096}


def matrices(experts, layers=1, numel=NUMEL, seed=0):
    rng = np.random.default_rng(seed)
    return [
        MatrixStats(
            f"model.layers.{layer}.mlp.experts.{expert}.{projection}",
            float(rng.uniform(2, 6)),
            1.0,
            3.0,
            size,
            {bits: 4.0**-bits for bits in range(1, 9)},
        )
        for layer in range(layers)
        for expert in range(experts)
        for projection, size in numel.items()
    ]


def by_expert(bits):
    experts = {}
    for name, width in bits.items():
        experts.setdefault(modes.expert_of(name), []).append(width)
    return experts


@pytest.mark.parametrize("mode", ["alphaq", "uniform", "random"])
@pytest.mark.parametrize("average", [2, 2.4, 3.5, 4])
def test_every_mode_fills_the_budget(mode, average):
    stats = matrices(10)
    choice = choose(stats, Budget(average, mode=mode))
    # Less than one matrix's or expert's step may be left.
    assert average - 3 / 30 < average_bits(choice.bits, stats) <= average
    assert choice.mode == mode
    assert set(choice.bits.values()) <= {2, 3, 4}
    assert list(choice.bits) == [matrix.name for matrix in stats]


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["uniform", "random"]), st.integers(20, 40), st.integers(0, 9))
def test_modes_without_alpha_never_exceed_the_budget(mode, tenths, seed):
    stats = matrices(5, numel={"w1": 96, "w2": 32, "w3": 160})
    choice = choose(stats, Budget(tenths / 10, mode=mode, seed=seed))
    assert average_bits(choice.bits, stats) <= tenths / 10
    assert choice.alpha is choice.gamma is choice.gap is None


def test_uniform_gives_one_width_where_that_is_the_budget():
    choice = choose(matrices(8), Budget(3, mode="uniform"))
    assert set(choice.bits.values()) == {3}


def test_uniform_mixes_the_neighbours_of_the_budget_evenly_over_layers():
    choice = choose(matrices(8, layers=3), Budget(3.5, widths=(2, 3, 4, 8), mode="uniform"))
    assert all(len(set(widths)) == 1 for widths in by_expert(choice.bits).values())
    for layer in range(3):
        widths = Counter(bits for name, bits in choice.bits.items() if f"layers.{layer}." in name)
        assert widths == {3: 12, 4: 12}


def test_ratio_ranks_experts_by_alpha():
    stats = matrices(10)
    choice = choose(stats, Budget(widths=(2, 3, 8), mode="ratio", shares=(0.2, 0.3)))
    widths = {expert: set(bits) for expert, bits in by_expert(choice.bits).items()}
    alpha = {e: np.mean([m.alpha for m in stats if modes.expert_of(m.name) == e]) for e in widths}
    ranked = sorted(widths, key=alpha.get)
    assert [widths[expert] for expert in ranked] == [{8}] * 2 + [{3}] * 5 + [{2}] * 3
    assert choice.alpha == (
        min(m.alpha for m in stats),
        pytest.approx(np.median([m.alpha for m in stats])),
        pytest.approx(max(m.alpha for m in stats)),
    )


@pytest.mark.parametrize(("shares", "widths"), [((1, 0), {4}), ((0, 1), {2}), ((0, 0), {3})])
def test_ratio_takes_extreme_shares(shares, widths):
    assert set(choose(matrices(7), Budget(mode="ratio", shares=shares)).bits.values()) == widths


def test_random_depends_on_the_seed_alone():
    one, same, other = (choose(matrices(20), Budget(3, mode="random", seed=seed)).bits for seed in (1, 1, 2))
    assert one == same != other
    # Written down, so that no release changes what a seed means.
    assert "".join(map(str, list(one.values())[:12])) == "242333344322"


@pytest.mark.parametrize("mode", ["alphaq", "random"])
def test_granularity_expert_gives_an_expert_one_width(mode):
    budget = Budget(3.1, mode=mode, granularity="expert")
    assert all(len(set(widths)) == 1 for widths in by_expert(choose(matrices(9), budget).bits).values())
    assert any(len(set(w)) > 1 for w in by_expert(choose(matrices(9), Budget(3.1, mode=mode)).bits).values())


@pytest.mark.parametrize("mode", ["alphaq", "uniform", "random"])
def test_fixed_widths_stay_and_count_towards_the_budget(mode):
    stats = matrices(10)
    fixed = {matrix.name: 8 for matrix in stats[:3]}
    choice = choose(stats, Budget(3.0, mode=mode), fixed)
    assert {name: choice.bits[name] for name in fixed} == fixed
    assert 2.85 < average_bits(choice.bits, stats) <= 3.0
    assert list(choice.bits) == [matrix.name for matrix in stats]


def test_fixed_widths_may_leave_part_of_an_expert():
    stats = matrices(6)
    choice = choose(stats, Budget(3.0, granularity="expert"), {stats[0].name: 1})
    assert choice.bits[stats[0].name] == 1
    assert choice.bits[stats[1].name] == choice.bits[stats[2].name]


def test_fixed_widths_must_leave_the_least_candidate_to_the_rest():
    stats = matrices(4)
    with pytest.raises(ValueError, match=r"`override`: .* at least 2 bits, .* got 1\.333"):
        choose(stats, Budget(3.0), {matrix.name: 8 for matrix in stats[:3]})


def test_fixed_widths_below_the_candidates_leave_at_most_the_greatest():
    stats = matrices(4)
    choice = choose(stats, Budget(4.0), {stats[0].name: 1})
    assert set(choice.bits.values()) == {1, 4}


def test_fixed_widths_may_be_all():
    stats = matrices(2)
    fixed = {matrix.name: 5 for matrix in stats}
    assert choose(stats, Budget(3.0, mode="uniform"), fixed).bits == fixed


def test_choose_wants_statistics_where_alpha_decides():
    class Plain:
        name, numel = "model.layers.0.mlp.experts.0.w1", 64

    with pytest.raises(TypeError, match="expected their statistics"):
        choose([Plain()], Budget(3.0))
    assert choose([Plain()], Budget(3.0, mode="uniform")).bits == {Plain.name: 3}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "best"}, "`mode`: expected one of .* got 'best'"),
        ({"granularity": "layer"}, "`granularity`: expected one of .* got 'layer'"),
        ({"mode": "ratio", "widths": (2, 4)}, "`mode=ratio` expects three widths, got 2,4"),
        ({"mode": "ratio", "shares": (0.6, 0.5)}, "`shares`: .* at most 1, got"),
        ({"mode": "ratio", "shares": (-0.1, 0.5)}, "`shares`: expected two shares from 0 up"),
        ({"mode": "ratio", "shares": (float("nan"), 0.5)}, "`shares`"),
    ],
)
def test_budget_refuses_what_a_mode_cannot_use(fields, message):
    with pytest.raises(ValueError, match=message):
        Budget(**fields)
