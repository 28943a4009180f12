"""Which repository a directory is a snapshot of."""

import pytest

from offline.source.hub import Snapshot, snapshot_of


@pytest.mark.parametrize(
    ("folder", "name"),
    [("models--owner--model", "owner/model"), ("models--Qwen--Qwen1.5-MoE-A2.7B", "Qwen/Qwen1.5-MoE-A2.7B"),
     ("models--gpt2", "gpt2")],
)  # fmt: skip
def test_a_snapshot_of_the_cache_has_its_models_name(tmp_path, folder, name):
    path = tmp_path / folder / "snapshots" / "abc"
    path.mkdir(parents=True)
    (tmp_path / "link").symlink_to(path)
    assert snapshot_of(path) == snapshot_of(tmp_path / "link") == Snapshot(name, "abc")


@pytest.mark.parametrize(
    "folder", ["datasets--a--b", "models--a--b--c", "models--", "models--a--", "models--a b--c", "x"]
)
def test_another_directory_has_none(tmp_path, folder):
    assert snapshot_of(tmp_path / folder / "snapshots" / "abc") is None
    assert snapshot_of(tmp_path / "models--a--b" / folder) is None
