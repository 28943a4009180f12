"""What inspect shows of a checkpoint, and draws."""

import json

import numpy as np
import pytest

from alphaq_vllm import convert
from offline.operations import heatmaps
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    """A conversion with statistics, not to be changed."""
    out = tmp_path_factory.mktemp("inspect") / "out"
    convert(tiny_model("qwen2_moe"), out, bits=3.0, noise="analytic", quantizer="mse")
    return out


@pytest.fixture(scope="module")
def bare(tiny_model, tmp_path_factory):
    """A conversion without statistics, every matrix of a layer and projection at its own width."""
    out = tmp_path_factory.mktemp("inspect") / "out"
    matrices = find_experts(open_checkpoint(str(tiny_model("mixtral")))).matrices
    convert(
        tiny_model("mixtral"),
        out,
        bit_map={matrix.name: 1 + i // 4 for i, matrix in enumerate(matrices)},
        quantizer="mse",
    )
    return out


def test_inspect_shows_the_bit_map_by_layer(alphaq, bare):
    status, out, _ = alphaq("inspect", bare)
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    assert "mixtral, AlphaQ format 1, groups of 64" in out
    assert "24 matrices, 3.5000 bits on average by codes, 3.7500 as stored" in out
    assert ["module", "projection", "1b", "2b", "3b", "4b", "5b", "6b", "average", "alpha"] in lines
    first = ["model.layers.0.block_sparse_moe.experts", "w1", "2", "1", "1", ".", ".", ".", "1.750"]
    assert first in lines
    assert "alpha is not known: no alphaq_stats.csv is with the checkpoint" in out


def test_inspect_shows_widths_against_alpha(alphaq, checkpoint):
    status, out, _ = alphaq("inspect", checkpoint, "--json")
    assert status == 0
    result = json.loads(out)
    assert result["bits"] == pytest.approx(3.0)
    assert result["size"] == (checkpoint / "model-00001-of-00001.safetensors").stat().st_size
    assert len(result["layers"]) == 6
    assert {sum(row["widths"].values()) for row in result["layers"]} == {4}
    medians = [result["alpha"][bits][1] for bits in ("2", "3", "4")]
    assert medians == sorted(medians, reverse=True)
    assert all(least <= middle <= greatest for least, middle, greatest in result["alpha"].values())
    text = alphaq("inspect", checkpoint)[1]
    assert "bits   least alpha   median   greatest" in text
    assert f"{medians[0]:.3f}" in text


def test_inspect_draws_alpha_and_bits(alphaq, checkpoint, bare, tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("matplotlib.image")
    heights = []
    for source in (checkpoint, bare):
        assert alphaq("inspect", source, "--plot", tmp_path / "map.png")[0] == 0
        pixels = image.imread(tmp_path / "map.png")
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10
        heights.append(pixels.shape[0])
    assert heights[0] == 2 * heights[1]


def test_inspect_says_that_matplotlib_is_missing(alphaq, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(heatmaps, "find_spec", lambda name: None)
    status, _, error = alphaq("inspect", checkpoint, "--plot", tmp_path / "map.png")
    assert status == 2
    assert "--plot: expected matplotlib to be installed, got none: pip install matplotlib" in error


def test_inspect_refuses_a_plot_of_unknown_format(alphaq, checkpoint, tmp_path):
    status, _, error = alphaq("inspect", checkpoint, "--plot", tmp_path / "map.txt")
    assert status == 2
    assert "--plot: expected a file name that ends in .png, .pdf, .svg" in error


def test_inspect_refuses_an_ordinary_model(alphaq, tiny_model):
    status, _, error = alphaq("inspect", tiny_model("qwen2_moe"))
    assert status == 2
    assert "expected an AlphaQ checkpoint, got one that is not quantized" in error
