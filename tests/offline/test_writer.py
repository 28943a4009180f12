"""Writing: the bytes that were planned, whole or not at all."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from alphaq_vllm.format import TensorSpec
from offline.checkpoint import open_checkpoint
from offline.writer import Piece, check_output, new_directory, plan_shards, write_checkpoint

DTYPES = (torch.bfloat16, torch.int32, torch.bool, torch.float64, torch.float8_e4m3fn)


def piece(**tensors):
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return Piece(specs, lambda: tensors)


def pieces_of(sizes):
    return [piece(**{f"t{i}": torch.full((size,), i, dtype=torch.uint8)}) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([4, 4, 2], [[4, 4, 2]]),
        ([4, 4, 3], [[4, 4], [3]]),
        ([11, 1], [[11], [1]]),
        ([1, 11, 1], [[1], [11], [1]]),
        ([10, 0, 1], [[10, 0], [1]]),
    ],
)
def test_plan_shards_fills_files_in_order(sizes, expected):
    shards = plan_shards(pieces_of(sizes), 10)
    assert [[piece.nbytes for piece in shard.pieces] for shard in shards] == expected
    assert shards[-1].name == f"model-{len(expected):05}-of-{len(expected):05}.safetensors"


def test_write_checkpoint_is_read_back_by_safetensors_and_as_long_as_planned(tmp_path):
    torch.manual_seed(0)
    tensors = {f"t{i}": (torch.rand(3, 5) * 4).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 7), "ü": torch.ones(1, 2).t()}
    pieces = [piece(**dict(list(tensors.items())[:3])), *(piece(**{n: t}) for n, t in list(tensors.items())[3:])]
    shards = plan_shards(pieces, 200)
    assert len(shards) == 2
    write_checkpoint(tmp_path, shards, {"a": 1}, [])
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [shard.name for shard in shards]
    assert [file.stat().st_size for file in files] == [shard.nbytes for shard in shards]
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(loaded[name].float(), tensor.float())
    assert set(open_checkpoint(str(tmp_path)).tensors) == set(tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)])
def test_write_checkpoint_refuses_what_was_not_planned(tmp_path, wrong):
    planned = Piece({"t": TensorSpec((2,), torch.float32)}, lambda: {"t": wrong})
    with pytest.raises(ValueError, match="t: expected TensorSpec"):
        write_checkpoint(tmp_path, plan_shards([planned], 100), {}, [])
    assert not list(tmp_path.glob("*.safetensors"))


def test_new_directory_appears_whole(tmp_path):
    out = tmp_path / "new" / "out"
    with new_directory(out) as directory:
        (directory / "file").write_text("x")
        assert not out.exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert (out / "file").read_text() == "x"


def test_new_directory_replaces_an_empty_one(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with new_directory(out) as directory:
        (directory / "file").write_text("x")
    assert (out / "file").exists()


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_new_directory_leaves_nothing_after_a_failure(tmp_path, error):
    with pytest.raises(error), new_directory(tmp_path / "out") as directory:
        (directory / "file").write_text("x")
        raise error
    assert not list(tmp_path.iterdir())


def test_new_directory_has_one_writer(tmp_path):
    with new_directory(tmp_path / "out") as directory:
        with pytest.raises(ValueError, match=r"out\.partial: exists already"), new_directory(tmp_path / "out"):
            pytest.fail("two writers")
        assert directory.exists()


def test_check_output_refuses_the_source_and_what_is_inside_it(tmp_path):
    for out in (tmp_path, tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(ValueError, match="outside the source"):
            check_output(out, tmp_path, 0)


def test_check_output_refuses_what_exists(tmp_path):
    (tmp_path / "out").mkdir()
    check_output(tmp_path / "out", tmp_path / "source", 0)
    (tmp_path / "out" / "file").write_text("x")
    with pytest.raises(ValueError, match="got one with files"):
        check_output(tmp_path / "out", tmp_path / "source", 0)
    with pytest.raises(ValueError, match="got a file"):
        check_output(tmp_path / "out" / "file", tmp_path / "source", 0)


def test_check_output_refuses_a_mount_point(tmp_path, monkeypatch):
    monkeypatch.setattr(type(tmp_path), "is_mount", lambda self: True)
    with pytest.raises(ValueError, match="a new directory inside it"):
        check_output(tmp_path / "out", tmp_path / "source", 0)


def test_check_output_wants_room_for_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9 if path == tmp_path else 0))
    check_output(tmp_path / "new" / "out", tmp_path / "source", 10**9)
    with pytest.raises(ValueError, match=r"expected 2\.0 GB of free disk space, got 1\.0 GB"):
        check_output(tmp_path / "new" / "out", tmp_path / "source", 2 * 10**9)
