"""Choosing widths: what the budget may be, how statistics become costs, and what a bit map must say."""

import json
import math
from dataclasses import replace

import pytest

from offline.allocation.bit_map import average_bits, check_bit_map, read_bit_map
from offline.allocation.widths import Budget, choose
from offline.operations.plan import to_spec
from offline.sensitivity.matrices import MatrixStats
from offline.source.families import ExpertMatrix
from offline.source.splitting import check_group_size

MODULE = "model.layers.0.mlp.experts"
MATRICES = [
    ExpertMatrix(MODULE, expert, name, (128, 256) if name == "down_proj" else (256, 128))
    for expert in range(2)
    for name in ("gate_proj", "up_proj", "down_proj")
]
BITS = {matrix.name: bits for matrix, bits in zip(MATRICES, [1, 2, 3, 4, 5, 8], strict=True)}


def stats(alphas, mse=None, variance=1.0):
    mse = mse or {2: 0.1, 3: 0.03, 4: 0.008}
    return [
        MatrixStats(matrix.name, a, variance, 3.0, matrix.numel, mse)
        for matrix, a in zip(MATRICES, alphas, strict=True)
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"average_bits": 1.9}, "`bits`: expected an average from 2 to 4.* got 1.9"),
        ({"average_bits": 4.1}, "`bits`: expected an average from 2 to 4.* got 4.1"),
        ({"average_bits": math.nan}, "`bits`: .* got nan"),
        ({"average_bits": -3}, "`bits`: .* got -3"),
        ({"average_bits": 0}, "`bits`: .* got 0"),
        ({"widths": (2, 9)}, "`candidate_bits`: .* got 2,9"),
        ({"widths": (0, 4)}, "`candidate_bits`: .* got 0,4"),
        ({"widths": (4, 3)}, "`candidate_bits`: expected ascending"),
        ({"widths": ()}, "`candidate_bits`"),
        ({"gamma": -1.0}, "`gamma`: .* got -1"),
        ({"gamma": math.nan}, "`gamma`: .* got nan"),
        ({"gamma": math.inf}, "`gamma`: .* got inf"),
        ({"noise": "none"}, "`noise`: .* got 'none'"),
    ],
)
def test_budget_refuses_the_impossible(fields, message):
    with pytest.raises(ValueError, match=message):
        Budget(**fields)


def test_budget_measures_only_what_it_uses():
    assert Budget(widths=(2, 3, 4)).measured_widths == (2, 3, 4)
    assert Budget(noise="analytic").measured_widths == ()


@pytest.mark.parametrize("kind", ["measured", "analytic"])
def test_choose_gives_more_bits_to_heavier_tails(kind):
    choice = choose(stats([3, 5, 2, 4, 6, 7]), Budget(3.0, gamma=3.0, noise=kind))
    ranked = [choice.bits[MATRICES[i].name] for i in (2, 0, 3, 1, 4, 5)]
    assert ranked == sorted(ranked, reverse=True)
    assert len(set(ranked)) > 1
    assert average_bits(choice.bits, MATRICES) == 3.0
    assert choice.alpha == (2, 4.5, 7)
    assert choice.gamma == 3.0
    assert 0 <= choice.gap < 1e-3


def test_alpha_does_not_count_beside_propagated_noise():
    matrices = [replace(matrix, gain=1.0) for matrix in stats([3, 5, 2, 4, 6, 7])]
    measured, propagated = (choose(matrices, Budget(3.0, noise=noise)) for noise in ("measured", "propagated"))
    assert propagated.gamma == 0 < measured.gamma


def test_choose_derives_gamma_from_the_spread_of_alpha():
    narrow, wide = (choose(stats(alphas), Budget(3.0)) for alphas in ([3, 3.1, 3.2, 3.3, 3.4, 3.5], [2, 3, 4, 5, 6, 7]))
    assert narrow.gamma > wide.gamma > 0


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_read_bit_map_returns_what_was_written(tmp_path):
    assert read_bit_map(write(tmp_path / "map.json", BITS)) == BITS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a JSON object"),
        ("[1]", "expected a JSON object"),
        ('{"a": 2, "a": 3}', "the key 'a' twice"),
        ({"a": 9}, "a: expected one of the widths .* got 9"),
        ({"a": 0}, "got 0"),
        ({"a": 2.0}, "got 2.0"),
        ({"a": True}, "got True"),
        ({"a": "2"}, "got '2'"),
    ],
)
def test_read_bit_map_refuses_what_is_not_one(tmp_path, content, message):
    path = write(tmp_path / "map.json", content)
    with pytest.raises(ValueError, match=message) as caught:
        read_bit_map(path)
    assert str(path) in str(caught.value)


def test_check_bit_map_wants_every_matrix_and_no_other():
    check_bit_map(BITS, MATRICES)
    first = MATRICES[0].name
    with pytest.raises(ValueError, match=f"expected all 6 expert matrices, got no width for {first}"):
        check_bit_map({name: bits for name, bits in BITS.items() if name != first}, MATRICES)
    with pytest.raises(ValueError, match=r"got also model\.norm"):
        check_bit_map({**BITS, "model.norm": 2}, MATRICES)


def test_average_bits_is_weighted_by_numel():
    small, large = ExpertMatrix("m", 0, "w1", (32, 32)), ExpertMatrix("m", 1, "w1", (96, 32))
    assert average_bits({small.name: 2, large.name: 4}, [small, large]) == 3.5


def test_check_group_size_names_one_that_fits():
    check_group_size(128, MATRICES)
    odd = [*MATRICES, ExpertMatrix(MODULE, 2, "down_proj", (128, 192))]
    check_group_size(64, odd)
    with pytest.raises(
        ValueError, match=r"2.down_proj: in_features=192 .* group_size=128: convert with `group_size=64`"
    ):
        check_group_size(128, odd)
    with pytest.raises(ValueError, match="no supported group size divides it"):
        check_group_size(32, [ExpertMatrix(MODULE, 0, "down_proj", (128, 100))])
    with pytest.raises(ValueError, match=r"`group_size`: .* got 48"):
        check_group_size(48, MATRICES)


def test_check_group_size_shares_the_columns_of_down_among_ranks():
    # Two groups of 128 among 8 ranks.
    check_group_size(128, MATRICES, tp_size=8)
    refused = r"0.down_proj: intermediate_size=256 over `tp_size={}` ranks is {} each, .* choose one of \[1, 2, 4, 8\]"
    for ranks, share in ((16, 16), (3, 85.3333)):
        with pytest.raises(ValueError, match=refused.format(ranks, share)):
            check_group_size(64, MATRICES, tp_size=ranks)


def test_to_spec_lists_widths_by_expert():
    spec = to_spec(BITS, MATRICES, 64)
    assert spec.group_size == 64
    assert spec.num_bits == {MODULE: {"gate_proj": (1, 4), "up_proj": (2, 5), "down_proj": (3, 8)}}
