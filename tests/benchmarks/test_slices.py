"""Slices of a dense model's feed-forward layers: quantized alone and by maps, with nothing left of it."""

import json
import shutil

import numpy as np
import pytest
import torch

from benchmarks import slices
from tests.conftest import MODEL
from tests.offline.conftest import save_tiny_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    vocabulary = json.loads((MODEL / "config.json").read_bytes())["vocab_size"]
    save_tiny_model("llama", folder, vocab_size=vocabulary, initializer_range=0.2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    return folder


def test_command(dense, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.jsonl"
    arguments = ["--text", str(MODEL / "held-out.txt"), "--slices", "4", "--windows", "2", "--context", "32"]
    arguments += ["--compared", "16", "--maps", "3", "--results", str(results)]
    monkeypatch.setattr("sys.argv", ["slices", str(dense), *arguments])
    slices.main()
    (line,) = map(json.loads, results.read_text().splitlines())
    assert (line["slices"], line["bits"], line["tokens"], line["compared"]) == (4, 2, 64, 16)
    # An error at the layer's output says more of what comes of it than any figure of the weights.
    within = {name: row["within"] for name, row in line["correlations"].items()}
    assert all(-1 <= value <= 1 for value in within.values())
    assert line["correlations"]["propagated error"]["all"] > 0.5
    found = line["maps"]["3"]
    assert all(sum(row["widths"].values()) == 24 for row in found.values() if "widths" in row)
    assert all(len(row["control_kl"]) == 3 for row in found.values() if "widths" in row)


def test_nothing_is_left_of_quantization(dense):
    texts = [(MODEL / "held-out.txt").read_text()]
    network = slices.Network(dense, None, texts, windows=1, context=32, compared=8)
    assert network.kl(network.predictions(0)) == pytest.approx(0, abs=1e-6)
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    matrices = network.slices(4)
    figures = slices.measure(network, matrices, 3)
    assert (figures["kl"] > 0).all() and len(figures["kl"]) == len(matrices) == 24
    assert all(torch.equal(before[name], tensor) for name, tensor in network.model.state_dict().items())


def test_spearman():
    assert slices.spearman(np.array([1.0, 2, 4, 3]), np.array([10.0, 20, 40, 30])) == pytest.approx(1)
    assert slices.spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
