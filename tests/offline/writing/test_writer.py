"""Writing: the bytes that were planned, whole or not at all."""

import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from alphaq_vllm.format import TensorSpec
from offline.source.checkpoint import open_checkpoint
from offline.source.stored import StoredTensor
from offline.writing import writer
from offline.writing.output import open_output
from offline.writing.writer import Piece, Writer, plan_shards

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


def test_writer_is_read_back_by_safetensors_and_as_long_as_planned(tmp_path):
    torch.manual_seed(0)
    tensors = {f"t{i}": (torch.rand(3, 5) * 4).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 7), "ü": torch.ones(1, 2).t()}
    pieces = [piece(**dict(list(tensors.items())[:3])), *(piece(**{n: t}) for n, t in list(tensors.items())[3:])]
    shards = plan_shards(pieces, 200)
    assert len(shards) == 2
    with open_output(tmp_path / "out", {}) as output:
        Writer(output, shards, {"a": 1}, []).write()
    out = tmp_path / "out"
    files = sorted(out.glob("*.safetensors"))
    assert [file.name for file in files] == [shard.name for shard in shards]
    assert [file.stat().st_size for file in files] == [shard.nbytes for shard in shards]
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(loaded[name].float(), tensor.float())
    assert set(open_checkpoint(str(out)).tensors) == set(tensors)
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)])
def test_writer_refuses_what_was_not_planned(tmp_path, wrong):
    planned = Piece({"t": TensorSpec((2,), torch.float32)}, lambda: {"t": wrong})
    with pytest.raises(ValueError, match="t: expected TensorSpec"), open_output(tmp_path / "out", {}) as output:
        Writer(output, plan_shards([planned], 100), {}, []).write()
    assert not list(tmp_path.iterdir())


def test_writer_copies_a_stored_tensor_in_parts(tmp_path, monkeypatch):
    content = bytes(range(250))
    (tmp_path / "source").write_bytes(b"before" + content + b"after")
    stored = StoredTensor(tmp_path / "source", 6, TensorSpec((250,), torch.uint8))
    monkeypatch.setattr(writer, "COPY_BYTES", 96)
    with open_output(tmp_path / "out", {}) as output:
        Writer(output, plan_shards([Piece({"t": stored.spec}, lambda: {"t": stored})], 1000), {}, []).write()
    assert load_file(next((tmp_path / "out").glob("*.safetensors")))["t"].numpy().tobytes() == content
    assert [len(chunk) for chunk in stored.chunks(96)] == [96, 96, 58]
    (tmp_path / "source").write_bytes(b"before")
    with pytest.raises(OSError, match="source: the file became shorter"):
        list(stored.chunks(96))


@dataclass
class Failing:
    """Computes a tensor, but for the first time."""

    tensor: torch.Tensor
    calls: int = 0

    def __call__(self) -> Mapping[str, torch.Tensor]:
        self.calls += 1
        if self.calls == 1:
            raise OSError(errno.EIO, "Input/output error", "disk")
        return {"late": self.tensor}


def test_writer_computes_only_what_is_not_finished(tmp_path):
    calls = []

    def early(i):
        calls.append(i)
        return {f"t{i}": torch.full((10,), i, dtype=torch.uint8)}

    pieces = [Piece({f"t{i}": TensorSpec((10,), torch.uint8)}, partial(early, i)) for i in range(5)]
    late = Failing(torch.ones(10, dtype=torch.uint8))
    # The last shard but one is finished in part: t4 before the failure.
    pieces += [Piece({"late": TensorSpec((10,), torch.uint8)}, late)]
    shards = plan_shards(pieces, 20)
    with pytest.raises(OSError, match="`resume`") as caught, open_output(tmp_path / "out", {}) as output:
        Writer(output, shards, {"a": 1}, []).write()
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, "disk")
    with open_output(tmp_path / "out", {}, resume=True) as output:
        Writer(output, shards, {"a": 1}, []).write()
    assert calls == [0, 1, 2, 3, 4]
    with open_output(tmp_path / "whole", {}) as output:
        Writer(output, shards, {"a": 1}, []).write()
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


def test_writer_refuses_to_continue_another_plan(tmp_path):
    failing = Piece({"late": TensorSpec((10,), torch.uint8)}, Failing(torch.ones(10, dtype=torch.uint8)))
    with pytest.raises(OSError), open_output(tmp_path / "out", {}) as output:
        Writer(output, plan_shards([failing], 20), {"a": 1}, []).write()
    with (
        pytest.raises(ValueError, match=r"cannot be resumed: .* planned other tensors or files"),
        open_output(tmp_path / "out", {}, resume=True) as output,
    ):
        Writer(output, plan_shards([failing], 20), {"a": 2}, []).write()
    assert (tmp_path / "out.partial").exists()


def test_writer_misses_a_file_that_was_taken_away(tmp_path):
    failing = Piece({"late": TensorSpec((10,), torch.uint8)}, Failing(torch.ones(10, dtype=torch.uint8)))
    shards = plan_shards([*pieces_of([10]), failing], 20)
    with pytest.raises(OSError), open_output(tmp_path / "out", {}) as output:
        Writer(output, shards, {}, []).write()
    next((tmp_path / "out.partial").rglob("*.tmp")).unlink()
    with (
        pytest.raises(ValueError, match=r"\.tmp: expected the file that an interrupted run left, got none"),
        open_output(tmp_path / "out", {}, resume=True) as output,
    ):
        Writer(output, shards, {}, []).write()


def test_writer_stores_what_others_compute_and_computes_the_rest(tmp_path):
    theirs = {f"t{i}": torch.full((10,), i, dtype=torch.uint8) for i in range(3)}
    spec = TensorSpec((10,), torch.uint8)
    planned = [Piece({"t0": spec, "t1": spec}, None), piece(late=torch.ones(10)), Piece({"t2": spec}, None)]
    shards = plan_shards(planned, 30)
    with pytest.raises(OSError), open_output(tmp_path / "out", {}) as output:
        Writer(output, shards, {}, []).store({"t0": theirs["t0"], "t1": theirs["t1"]})
        raise OSError(errno.EIO, "Input/output error", "disk")
    with open_output(tmp_path / "out", {}, resume=True) as output:
        resumed = Writer(output, shards, {}, [])
        # What is stored stays as it is.
        resumed.store({name: torch.zeros_like(tensor) for name, tensor in theirs.items() if name != "t2"})
        resumed.store({"t2": theirs["t2"]})
        resumed.write()
    loaded = {
        name: tensor for file in (tmp_path / "out").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert loaded.keys() == {*theirs, "late"}
    assert all(torch.equal(loaded[name], theirs[name]) for name in theirs)


def test_writer_misses_what_nobody_stored(tmp_path):
    planned = Piece({"t": TensorSpec((10,), torch.uint8)}, None)
    with (
        pytest.raises(AssertionError, match="t: expected them to be stored before"),
        open_output(tmp_path / "out", {}) as output,
    ):
        Writer(output, plan_shards([planned], 30), {}, []).write()
