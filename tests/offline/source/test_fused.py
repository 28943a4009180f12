"""Fused expert tensors: every layout is read as the matrices that it was made of, one expert at a time."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from offline.source.architectures import FAMILIES
from offline.source.checkpoint import SINGLE, open_checkpoint
from offline.source.families import find_experts, load_matrix, matrix_nbytes, tensor_shape
from offline.source.fused import FusedLayout

LAYOUTS = [FusedLayout(transposed=t, interleaved=i) for t in (False, True) for i in (False, True)]
CONFIG = {"model_type": "olmoe", "num_experts": 3, "hidden_size": 64, "num_hidden_layers": 1}
MODULE = "model.layers.0.mlp.experts"
GATE_UP, DOWN = f"{MODULE}.gate_up_proj", f"{MODULE}.down_proj"


def fuse(gate, up, down, layout):
    """The two fused tensors of lists of matrices, element by element."""
    gate_up = torch.empty(len(gate), 2 * gate[0].shape[0], gate[0].shape[1], dtype=gate[0].dtype)
    for expert, (g, u) in enumerate(zip(gate, up, strict=True)):
        for row in range(g.shape[0]):
            gate_up[expert, 2 * row if layout.interleaved else row] = g[row]
            gate_up[expert, 2 * row + 1 if layout.interleaved else g.shape[0] + row] = u[row]
    fused = {GATE_UP: gate_up, DOWN: torch.stack(down)}
    return {name: t.transpose(1, 2).contiguous() if layout.transposed else t for name, t in fused.items()}


def write(path, tensors):
    path.mkdir()
    save_file(tensors, path / SINGLE)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return open_checkpoint(str(path))


@pytest.fixture
def matrices():
    torch.manual_seed(0)
    shapes = ((96, 64), (96, 64), (64, 96))
    return [[torch.randn(shape).bfloat16() for _ in range(3)] for shape in shapes]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_matrix_reads_every_layout(matrices, tmp_path, monkeypatch, layout):
    monkeypatch.setitem(FAMILIES, "olmoe", replace(FAMILIES["olmoe"], fused=layout))
    source = write(tmp_path / "model", fuse(*matrices, layout))
    found = find_experts(source).matrices
    assert [m.name for m in found[:3]] == [f"{MODULE}.0.{p}" for p in ("gate_proj", "up_proj", "down_proj")]
    for matrix in found:
        expected = matrices[("gate_proj", "up_proj", "down_proj").index(matrix.projection)][matrix.expert]
        weight = load_matrix(source, matrix)
        assert weight.is_contiguous() and weight.dtype == torch.float32
        assert matrix.shape == tuple(weight.shape)
        assert torch.equal(weight, expected.float())
        assert matrix_nbytes(source, matrix) == 96 * 64 * 2
        assert tensor_shape([m for m in found if m.tensor == matrix.tensor]) == source.spec(matrix.tensor).shape


@pytest.mark.parametrize("square", [False, True], ids=["", "square"])
@pytest.mark.parametrize("stored", [False, True])
def test_load_matrix_finds_the_orientation_in_the_shapes(tmp_path, square, stored):
    """Also where gate and up together are as wide as the hidden states."""
    rows = 32 if square else 96
    lists = [[torch.randn(shape).bfloat16() for _ in range(3)] for shape in ((rows, 64), (rows, 64), (64, rows))]
    source = write(tmp_path / "model", fuse(*lists, FusedLayout(transposed=stored)))
    for matrix in find_experts(source).matrices:
        expected = lists[("gate_proj", "up_proj", "down_proj").index(matrix.projection)][matrix.expert]
        assert torch.equal(load_matrix(source, matrix), expected.float())


def test_find_experts_reads_three_fused_tensors(tmp_path, monkeypatch):
    """Gate and up in a tensor of their own each, as in Step."""
    layout = FusedLayout(gate_up="gate_proj.weight", up="up_proj.weight", down="down_proj.weight")
    monkeypatch.setitem(FAMILIES, "olmoe", replace(FAMILIES["olmoe"], fused=layout, individual=False))
    torch.manual_seed(0)
    shapes = {"gate_proj": (3, 96, 64), "up_proj": (3, 96, 64), "down_proj": (3, 64, 96)}
    tensors = {f"model.layers.0.mlp.{name}.weight": torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    source = write(tmp_path / "model", tensors)
    found = find_experts(source).matrices
    assert len(found) == 9
    for matrix in found:
        expected = tensors[f"model.layers.0.mlp.{matrix.projection}.weight"][matrix.expert]
        assert torch.equal(load_matrix(source, matrix), expected.float())
        assert tensor_shape([m for m in found if m.tensor == matrix.tensor]) == source.spec(matrix.tensor).shape


def test_load_matrix_reads_no_more_than_its_expert(matrices, tmp_path, monkeypatch):
    source = write(tmp_path / "model", fuse(*matrices, LAYOUTS[0]))
    found, fromfile, read = find_experts(source).matrices, np.fromfile, []
    monkeypatch.setattr(
        np, "fromfile", lambda *args, **kwargs: read.append(kwargs["count"]) or fromfile(*args, **kwargs)
    )
    for matrix in found:
        load_matrix(source, matrix)
    assert max(read) == 2 * 96 * 64 * 2


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_5_moe"])
def test_load_matrix_reads_what_transformers_fuses(tiny_model, tmp_path, model_type):
    """As on the Hub for Qwen3.5-MoE, and as transformers saves any family on request."""
    path = tiny_model(model_type)
    auto = transformers.AutoModelForCausalLM if model_type == "qwen2_moe" else transformers.AutoModelForImageTextToText
    auto.from_pretrained(path, dtype="auto").save_pretrained(tmp_path, save_original_format=False)
    fused, individual = open_checkpoint(str(tmp_path)), open_checkpoint(str(path))
    assert len(fused.tensors) < len(individual.tensors)
    found = find_experts(fused).matrices
    assert [m.name for m in found] == [m.name for m in find_experts(individual).matrices]
    for matrix in found:
        assert matrix.fused is not None
        assert torch.equal(load_matrix(fused, matrix), individual.load(f"{matrix.name}.weight").float())


def test_find_experts_takes_modules_of_either_kind_in_one_model(tiny_model, tmp_path):
    path = shutil.copytree(tiny_model("qwen2_moe"), tmp_path / "model")
    tensors, module = load_file(path / SINGLE), "model.layers.1.mlp.experts"
    lists = [[tensors.pop(f"{module}.{e}.{p}.weight") for e in range(4)] for p in ("gate_proj", "up_proj", "down_proj")]
    fused = fuse(*lists, LAYOUTS[0])
    save_file({**tensors, **{name.replace(MODULE, module): t for name, t in fused.items()}}, path / SINGLE)
    matrices = find_experts(open_checkpoint(str(path))).matrices
    assert [m.name for m in matrices] == [
        m.name for m in find_experts(open_checkpoint(str(tiny_model("qwen2_moe")))).matrices
    ]
    assert {m.fused is None for m in matrices if m.module != module} == {True}
    assert {m.fused is None for m in matrices if m.module == module} == {False}


BAD = {
    "number of experts": (
        lambda t: t.update({DOWN: t[DOWN][:2].clone()}),
        f"{DOWN}: expected .* of 3 experts in bfloat16",
    ),
    "two dimensions": (lambda t: t.update({DOWN: t[DOWN][0].clone()}), f"{DOWN}: expected .*out, in. of 3 experts"),
    "odd": (lambda t: t.update({GATE_UP: t[GATE_UP][:, 1:].clone()}), f"{GATE_UP}: .* an even number, got 191"),
    "dtype": (
        lambda t: t.update({DOWN: t[DOWN].to(torch.int8)}),
        f"{DOWN}: expected .* in bfloat16, .* got torch.int8",
    ),
    "down missing": (lambda t: t.pop(DOWN), "got none of experts.down_proj"),
    "unequal": (
        lambda t: t.update({DOWN: t[DOWN][:, :, :32].clone()}),
        "0.down_proj: expected an intermediate size of 96 .* got 32",
    ),
    "bias": (lambda t: t.update({f"{GATE_UP}_bias": torch.zeros(3, 192)}), "got also experts.gate_up_proj_bias"),
}


@pytest.mark.parametrize("name", BAD)
def test_find_experts_refuses_bad_fused_tensors(matrices, tmp_path, name):
    edit, message = BAD[name]
    tensors = fuse(*matrices, LAYOUTS[0])
    edit(tensors)
    source = write(tmp_path / "model", tensors)
    with pytest.raises(ValueError, match=message):
        find_experts(source)
