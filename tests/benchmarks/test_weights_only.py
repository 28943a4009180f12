"""Maps of widths from weights alone: each within its budget, and its control with as many matrices of each width."""

import argparse

import pytest

from benchmarks import weights_only
from benchmarks.weights_only import MAPS, Maps, Measured, build_parser, widths_of
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts
from tests.conftest import MODEL


class Bench:
    """As ``benchmarks.quality`` has it, without a model that runs."""

    def __init__(self):
        self.source = open_checkpoint(str(MODEL))
        self.experts = find_experts(self.source)


@pytest.fixture(scope="module")
def measured():
    bench = Bench()
    return Measured(bench.source, bench.experts)


@pytest.mark.parametrize("bits", [2.5, 3.0, 4.0])
@pytest.mark.parametrize("name", MAPS)
def test_every_map_fills_its_budget(measured, name, bits):
    widths = widths_of(measured, name, bits)
    assert len(widths) == 72
    assert bits - 0.05 < sum(widths) / 72 <= bits
    assert set(widths) <= ({3, 4, 5} if bits == 4 else {2, 3, 4})


def test_maps_that_know_something_differ(measured):
    maps = {name: widths_of(measured, name, 3.5) for name in ("uniform", "alpha", "relative error", "kurtosis", "expert")}
    assert len(set(maps.values())) == len(maps)
    assert widths_of(measured, "random", 3.5, 1) != widths_of(measured, "random", 3.5, 2)


def test_a_control_has_as_many_of_each_width_and_other_places(measured, monkeypatch, tmp_path):
    maps = Maps.__new__(Maps)
    maps.measured, seen = measured, []
    maps.score = lambda widths, grid="mse": seen.append(widths) or {"kl": len(seen), "perplexity": 1.0}
    row = maps.row("alpha", 3.5, 5)
    first, *controls = seen
    assert len(set(controls)) == 5
    assert all(sorted(control) == sorted(first) and control != first for control in controls)
    assert row["control_kl"] == [2, 3, 4, 5, 6]
    assert row["widths"] == {str(width): first.count(width) for width in sorted(set(first))}


def test_the_command_takes_what_its_help_says():
    args = build_parser().parse_args(["MODEL", "--text", "FILE"])
    assert isinstance(args, argparse.Namespace)
    assert (args.seeds, args.results) == (5, weights_only.RESULTS)
