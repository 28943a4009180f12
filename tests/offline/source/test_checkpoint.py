"""Reading: what is whole is read exactly, what is not is refused with a sentence that names it."""

import json
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from offline.source import checkpoint
from offline.source.checkpoint import INDEX, SINGLE, open_checkpoint
from offline.source.header import DTYPES, layout, read_header


def set_length(path, length):
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


def edit_json(path, edit):
    content = json.loads(path.read_bytes())
    edit(content)
    path.write_text(json.dumps(content))


def edit_header(path, edit):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_weight_map(path, edit):
    edit_json(path / INDEX, lambda index: edit(index["weight_map"]))


def test_open_checkpoint_reads_every_tensor_as_safetensors_does(sharded_model):
    opened = open_checkpoint(str(sharded_model))
    files = sorted(sharded_model.glob("*.safetensors"))
    assert len(files) == 3
    assert opened.nbytes == sum(file.stat().st_size for file in files)
    seen = set()
    for file in files:
        with safe_open(file, "pt") as reference:
            for name in reference.keys():  # noqa: SIM118 (not a mapping)
                torch.testing.assert_close(opened.load(name), reference.get_tensor(name), rtol=0, atol=0)
                seen.add(name)
    assert set(opened.tensors) == seen


def test_load_reads_every_dtype_scalars_and_empty_tensors(tmp_path):
    torch.manual_seed(0)
    tensors = {f"t.{i}": (torch.rand(3, 5) * 4).to(dtype) for i, dtype in enumerate(DTYPES.values())}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 7, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text("{}")
    opened = open_checkpoint(str(tmp_path))
    for name, tensor in tensors.items():
        loaded = opened.load(name)
        assert loaded.dtype == tensor.dtype
        assert loaded.shape == tensor.shape
        assert torch.equal(loaded.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_load_reports_a_file_that_vanishes_or_shrinks(model):
    opened = open_checkpoint(str(model))
    os.truncate(model / SINGLE, 10_000)
    with pytest.raises(OSError, match=r"model.safetensors.*shorter"):
        opened.load(list(opened.tensors)[-1])
    (model / SINGLE).unlink()
    with pytest.raises(FileNotFoundError):
        opened.load("lm_head.weight")


def test_layout_is_read_back_and_aligned():
    from alphaq_vllm.format import TensorSpec

    specs = {"a": TensorSpec((3,), torch.uint8), "b": TensorSpec((5, 7), torch.float64)}
    specs |= {"ü": TensorSpec((), torch.bfloat16), "c": TensorSpec((0, 2), torch.int32)}
    header, offsets = layout(specs)
    assert len(header) % 8 == 0
    assert all(offsets[name] % spec.dtype.itemsize == 0 for name, spec in specs.items())


def test_layout_fills_the_file_exactly(tmp_path):
    from alphaq_vllm.format import TensorSpec

    specs = {"a": TensorSpec((3,), torch.uint8), "b": TensorSpec((5, 7), torch.float64)}
    header, offsets = layout(specs)
    (tmp_path / "x").write_bytes(header + bytes(283))
    stored = read_header(tmp_path / "x")
    assert {name: (tensor.offset, tensor.spec) for name, tensor in stored.items()} == {
        name: (offsets[name], spec) for name, spec in specs.items()
    }


def overlap(header):
    first, second = (name for name in header if name != "__metadata__" and "experts.0.up" in name)
    header[second]["data_offsets"] = header[first]["data_offsets"]


BAD_SHARDS = {
    "truncated header": (lambda p: os.truncate(p, 100), "truncated header: expected .* got 92"),
    "short data": (lambda p: os.truncate(p, p.stat().st_size - 1), "expected .* bytes of tensor data .* got"),
    "long data": (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "expected .* bytes of tensor data .* got"),
    "zero bytes": (lambda p: os.truncate(p, 0), "got 0 bytes"),
    "seven bytes": (lambda p: os.truncate(p, 7), "got 7 bytes"),
    "LFS pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"),
        "Git LFS pointer: run 'git lfs pull'",
    ),
    "absurd header length": (lambda p: set_length(p, 2**63), f"header length: .* got {2**63}"),
    "header length of all ones": (lambda p: set_length(p, 2**64 - 1), "header length"),
    "header not JSON": (lambda p: set_length(p, 10), "header: expected JSON"),
    "header not UTF-8": (lambda p: p.write_bytes(struct.pack("<Q", 2) + b"\xff\xfe"), "header: expected JSON"),
    "header a list": (lambda p: p.write_bytes(struct.pack("<Q", 2) + b"[]"), "expected a JSON object, got list"),
    "header nested": (lambda p: p.write_bytes(struct.pack("<Q", 10**5) + b"[" * 10**5), "header: expected JSON"),
    "key twice": (
        lambda p: p.write_bytes(struct.pack("<Q", 15) + b'{"a":{},"a":{}}'),
        "the key 'a' twice",
    ),
    "entry not an object": (
        lambda p: edit_header(p, lambda h: h.update(x=1)),
        "'x': expected dtype, shape and two data_offsets",
    ),
    "extra key": (
        lambda p: edit_header(p, lambda h: h["lm_head.weight"].update(extra=1)),
        "'lm_head.weight': expected dtype, shape and two data_offsets",
    ),
    "unknown dtype": (
        lambda p: edit_header(p, lambda h: h["lm_head.weight"].update(dtype="F4")),
        "dtype: expected one of .* got 'F4'",
    ),
    "dtype a list": (lambda p: edit_header(p, lambda h: h["lm_head.weight"].update(dtype=[])), "dtype: expected one"),
    "negative shape": (
        lambda p: edit_header(p, lambda h: h["lm_head.weight"].update(shape=[-1, -32768])),
        "integers from 0 up",
    ),
    "boolean shape": (
        lambda p: edit_header(p, lambda h: h["lm_head.weight"].update(shape=[True, 32768])),
        "integers from 0 up",
    ),
    "huge shape": (
        lambda p: edit_header(p, lambda h: h["lm_head.weight"].update(shape=[2**62, 2**62])),
        "expected the bytes of BF16",
    ),
    "overlap": (lambda p: edit_header(p, overlap), "a gap or overlap"),
    "gap": (lambda p: edit_header(p, lambda h: h.pop("model.norm.weight")), "gap or overlap|bytes of tensor data"),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_open_checkpoint_refuses_a_bad_shard(model, name):
    damage, message = BAD_SHARDS[name]
    damage(model / SINGLE)
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(str(model))
    assert SINGLE in str(caught.value)


@given(header=st.binary(max_size=64), data=st.binary(max_size=8), length=st.none() | st.integers(0, 2**64 - 1))
@settings(max_examples=200, deadline=None)
def test_read_header_raises_only_value_errors(tmp_path_factory, header, data, length):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    try:
        read_header(path)
    except ValueError as error:
        assert path.name in str(error)


FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"


def duplicate(path):
    """Add to the second shard a tensor of the first."""
    with safe_open(path / FIRST, "pt") as shard:
        name = sorted(shard.keys())[0]
        tensor = shard.get_tensor(name)
    with safe_open(path / SECOND, "pt") as shard:
        tensors = {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118 (not a mapping)
    save_file({**tensors, name: tensor}, path / SECOND)


def swap_places(weight_map):
    name = next(name for name, shard in weight_map.items() if shard == FIRST)
    weight_map[name] = SECOND


BAD_INDEXES = {
    "shard missing": (lambda p: (p / SECOND).unlink(), f"names {SECOND}, which is missing"),
    "tensor missing": (
        lambda p: edit_weight_map(p, lambda m: m.update({"model.extra.weight": FIRST})),
        "names tensor 'model.extra.weight', which .* lacks",
    ),
    "tensor not in the index": (
        lambda p: edit_weight_map(p, lambda m: m.pop("lm_head.weight")),
        "has tensor 'lm_head.weight', which .* does not name",
    ),
    "tensor in two shards": (duplicate, f"expected it in one shard, got {FIRST}, {SECOND}"),
    "tensor in another shard": (lambda p: edit_weight_map(p, swap_places), f"in {SECOND}, but {FIRST} has it"),
    "traversal": (lambda p: edit_weight_map(p, lambda m: m.update({"a": "../x.safetensors"})), "in this directory"),
    "absolute path": (lambda p: edit_weight_map(p, lambda m: m.update({"a": "/x.safetensors"})), "in this directory"),
    "pickle shard": (lambda p: edit_weight_map(p, lambda m: m.update({"a": "x.bin"})), "safetensors file in this"),
    "shard not a string": (lambda p: edit_weight_map(p, lambda m: m.update({"a": 1})), "safetensors file in this"),
    "no weight map": (lambda p: (p / INDEX).write_text("{}"), "weight_map: expected an object"),
    "weight map a list": (lambda p: (p / INDEX).write_text('{"weight_map": []}'), "weight_map: expected an object"),
    "index not JSON": (lambda p: (p / INDEX).write_text("{"), "expected JSON"),
    "index missing": (lambda p: (p / INDEX).unlink(), "download the index"),
    "single file beside": (lambda p: (p / SINGLE).write_bytes(b""), "both model.safetensors and .* are present"),
}


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_open_checkpoint_refuses_a_bad_index(sharded, name):
    damage, message = BAD_INDEXES[name]
    damage(sharded)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_checkpoint(str(sharded))


BAD_DIRECTORIES = {
    "no config": (lambda p: (p / "config.json").unlink(), "config.json: no such file"),
    "config not JSON": (lambda p: (p / "config.json").write_text("{'a': 1}"), "config.json: expected JSON"),
    "config not UTF-8": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe"), "config.json: expected JSON"),
    "config a list": (lambda p: (p / "config.json").write_text("[]"), "config.json: expected a JSON object, got list"),
    "config an LFS pointer": (
        lambda p: (p / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "config.json.*Git LFS pointer",
    ),
    "tokenizer an LFS pointer": (
        lambda p: (p / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "tokenizer.json.*Git LFS pointer",
    ),
    "weights a directory": (lambda p: ((p / SINGLE).unlink(), (p / SINGLE).mkdir()), f"{SINGLE}: expected a file"),
    "weights a link to nothing": (
        lambda p: ((p / SINGLE).unlink(), (p / SINGLE).symlink_to("nowhere")),
        f"{SINGLE}: expected a file, got a directory or a link that leads to none",
    ),
    "no weights": (lambda p: (p / SINGLE).unlink(), "no weights"),
    "pickle weights": (lambda p: (p / SINGLE).rename(p / "pytorch_model.bin"), "only pickled ones"),
}


@pytest.mark.parametrize("name", BAD_DIRECTORIES)
def test_open_checkpoint_refuses_a_bad_directory(model, name):
    damage, message = BAD_DIRECTORIES[name]
    damage(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_checkpoint(str(model))


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "/nowhere/at/all", "../a/b"])
def test_open_checkpoint_refuses_a_missing_directory(name):
    with pytest.raises(FileNotFoundError, match="no such directory, and not a name on the Hugging Face Hub"):
        open_checkpoint(name)


def test_open_checkpoint_refuses_a_file(model):
    with pytest.raises(ValueError, match="got a file"):
        open_checkpoint(str(model / SINGLE))


def test_open_checkpoint_downloads_a_hub_name_without_code_or_pickles(model, monkeypatch):
    import fnmatch

    import huggingface_hub

    def snapshot_download(name, revision, allow_patterns, ignore_patterns):
        def wanted(file):
            return any(fnmatch.fnmatch(file, p) for p in allow_patterns) and not any(
                fnmatch.fnmatch(file, p) for p in ignore_patterns
            )

        assert (name, revision) == ("owner/model", "v1")
        assert all(map(wanted, ["model-00001-of-00002.safetensors", INDEX, "tokenizer.json", "chat_template.jinja"]))
        assert not any(map(wanted, ["modeling.py", "pytorch_model.bin", "x/a.safetensors", "consolidated.safetensors"]))
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_checkpoint("owner/model", "v1").path == model


def test_open_checkpoint_explains_a_failed_download(monkeypatch):
    import huggingface_hub

    def snapshot_download(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match=r"owner/model: no such directory, and .* did not deliver it: offline"):
        open_checkpoint("owner/model")


def test_sidecars_are_what_a_model_needs_beside_its_weights(model):
    for name in ["tokenizer.json", "vocab.txt", "chat_template.jinja", "LICENSE", "modeling.py", "README.md", INDEX]:
        (model / name).write_text("{}")
    (model / INDEX).unlink()
    names = [path.name for path in open_checkpoint(str(model)).sidecars]
    assert names == ["LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json", "vocab.txt"]


def test_some_counts_what_it_leaves_out():
    assert checkpoint.some("abc") == "a, b, c"
    assert checkpoint.some("abcdef") == "a, b, c and 3 more"
