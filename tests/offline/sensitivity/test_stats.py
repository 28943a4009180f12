"""The file of statistics: read back exactly, refused when it is of anything else."""

import json

import pytest
from safetensors.torch import load_file, save_file

from offline.sensitivity import stats as module
from offline.sensitivity.matrices import MatrixStats
from offline.sensitivity.stats import Origin, Statistics, read_statistics
from offline.source.checkpoint import open_checkpoint
from offline.source.fingerprint import fingerprint

MATRICES = [
    MatrixStats("model.layers.0.mlp.experts.0.gate_proj", 3.1, 1 / 3, 2.5, 64, {2: 0.1, 4: 1e-300}),
    MatrixStats('a "quoted", name', 2.0, 0.0, 3.0, 32, {2: 0.0, 4: 0.0}),
]
STATISTICS = Statistics(Origin("model", "abc", 128, 2, 1000, 900), MATRICES)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "stats.csv"
    path.write_text(str(STATISTICS))
    return path


def test_read_statistics_returns_what_was_written(path):
    assert read_statistics(path) == STATISTICS
    assert read_statistics(path).widths == (2, 4)
    lines = path.read_text().splitlines()
    assert lines[1] == "name,alpha,variance,reach,numel,mse_2,mse_4"
    assert lines[2] == f"{MATRICES[0].name},3.1,0.3333333333333333,2.5,64,0.1,1e-300"


def test_read_statistics_refuses_a_directory(tmp_path):
    with pytest.raises(ValueError, match="expected a file of statistics, got a directory: name a file"):
        read_statistics(tmp_path)


def test_read_statistics_without_errors(tmp_path):
    bare = Statistics(Origin("m", "f", 64, 1, 0, 0), [MatrixStats("a", 2.5, 1.0, 3.0, 64, {})])
    (tmp_path / "s.csv").write_text(str(bare))
    assert read_statistics(tmp_path / "s.csv") == bare


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# alphaq statistics", "#", "line 1: expected '# alphaq statistics '"),
        ('"group_size": 128', '"group_size": "128"', r"line 1: .*\['group_size'\]"),
        ('"group_size": 128, ', "", r"line 1: .*\['group_size'\]"),
        ('{"source"', '{"more": 1, "source"', "line 1: .*more"),
        ("variance,", "", "expected the columns name,alpha,variance,reach,numel and mse_<bits>"),
        ("mse_4", "mse_9", "expected the columns"),
        (",3.1,", ",nan,", "line 3: expected positive finite numbers"),
        (",3.1,", ",0,", "line 3: expected positive finite numbers"),
        (",3.1,", ",-3.1,", "line 3"),
        (",3.1,", ",inf,", "line 3"),
        (",3.1,", ",much,", "line 3: expected a name and numbers"),
        (",64,", ",64,7,", "line 3: expected a name and numbers"),
        (",64,", ",64.5,", "line 3"),
        (",32,", ",0,", "line 4"),
        ('"a ""quoted"", name"', MATRICES[0].name, "one line for each of 2 matrices"),
        ('"matrices": 2', '"matrices": 3', "one line for each of 3 matrices, got 2"),
    ],
)
def test_read_statistics_refuses_what_is_damaged(path, old, new, message):
    assert path.read_text().count(old) >= 1
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as caught:
        read_statistics(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\n", b"# alphaq statistics [1]\n", b"# alphaq statistics {\n"])
def test_read_statistics_refuses_other_files(tmp_path, content):
    (tmp_path / "s.csv").write_bytes(content)
    with pytest.raises(ValueError, match="line 1"):
        read_statistics(tmp_path / "s.csv")


def test_read_statistics_says_how_to_make_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"make it with python -m offline\.measure MODEL -o"):
        read_statistics(tmp_path / "none.csv")


def test_check_accepts_its_own_source_and_settings():
    STATISTICS.check("abc", 128, (2,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("other", 128, (2,)), "out of date: fingerprint: expected other, got abc"),
        (("abc", 64, (2,)), "out of date: group_size: expected 64, got 128"),
        (("abc", 128, (2, 3)), "expected the errors at 2, 3 bits, got none at 3: measure again"),
    ],
)
def test_check_refuses_stale_statistics(arguments, message):
    with pytest.raises(ValueError, match=message):
        STATISTICS.check(*arguments)


def test_check_refuses_those_of_another_version(monkeypatch):
    monkeypatch.setattr(module, "VERSION", "99.0")
    with pytest.raises(ValueError, match=r"version: expected 99\.0, got"):
        STATISTICS.check("abc", 128, ())


def test_of_picks_matrices_in_order_and_wants_all():
    names = [matrix.name for matrix in MATRICES]
    assert STATISTICS.of(names[::-1]) == MATRICES[::-1]
    with pytest.raises(ValueError, match="expected statistics of all 2 matrices, got none of x"):
        STATISTICS.of([names[0], "x"])


def changed_config(model):
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))


def changed_weight(model):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"] *= 1.5
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("change", [changed_config, changed_weight])
def test_fingerprint_tells_sources_apart(model, tiny_model, change):
    assert fingerprint(open_checkpoint(str(model))) == fingerprint(open_checkpoint(str(tiny_model("qwen2_moe"))))
    change(model)
    assert fingerprint(open_checkpoint(str(model))) != fingerprint(open_checkpoint(str(tiny_model("qwen2_moe"))))
