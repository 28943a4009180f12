"""Finding the experts: every family as transformers writes it, and every way in which they can be wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline.checkpoint import SINGLE, open_checkpoint
from offline.families import FAMILIES, find_experts

EXPERT = "model.layers.1.mlp.experts.2"


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(path, edit):
    tensors = load_file(path / SINGLE)
    edit(tensors)
    save_file(tensors, path / SINGLE)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_find_experts_finds_every_family(tiny_model, model_type):
    source = open_checkpoint(str(tiny_model(model_type)))
    experts = find_experts(source)
    assert (experts.model_type, experts.num_experts) == (model_type, 4)
    layers = 1 if model_type.startswith("deepseek") else 2
    assert len(experts.modules) == layers
    assert len(experts.matrices) == layers * 4 * 3
    assert {matrix.tensor for matrix in experts.matrices} == {name for name in source.tensors if ".experts." in name}
    assert experts.numel == layers * 4 * 3 * 128 * 128


def test_find_experts_orders_layers_and_experts_by_number(tmp_path):
    module = "model.layers.{}.mlp.experts"
    tensors = {
        f"{module.format(layer)}.{expert}.{name}.weight": torch.zeros(shape)
        for layer in (10, 2)
        for expert in range(11)
        for name, shape in {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}.items()
    }
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text('{"model_type": "olmoe", "num_experts": 11, "hidden_size": 32}')
    experts = find_experts(open_checkpoint(str(tmp_path)))
    assert experts.modules == [module.format(2), module.format(10)]
    assert [m.expert for m in experts.matrices] == [e for _ in range(2) for e in range(11) for _ in range(3)]
    assert [m.projection for m in experts.matrices[:3]] == ["gate_proj", "up_proj", "down_proj"]
    assert [m.shape for m in experts.matrices[:3]] == [(64, 32), (64, 32), (32, 64)]


BAD_TENSORS = {
    "expert missing": (
        lambda t: [t.pop(f"{EXPERT}.{p}.weight") for p in ("gate_proj", "up_proj", "down_proj")],
        "expected 4 experts .* got none of 2.gate_proj.weight, 2.up_proj.weight, 2.down_proj.weight",
    ),
    "projection missing": (lambda t: t.pop(f"{EXPERT}.up_proj.weight"), "got none of 2.up_proj.weight"),
    "bias": (lambda t: t.update({f"{EXPERT}.up_proj.bias": torch.zeros(128)}), "got also 2.up_proj.bias"),
    "fused": (
        lambda t: [
            t.update({"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(4, 256, 128)}),
            *(t.pop(f"model.layers.1.mlp.experts.{e}.gate_proj.weight") for e in range(4)),
        ],
        "got none of 0.gate_proj.weight.* but gate_up_proj",
    ),
    "no experts": (lambda t: [t.pop(n) for n in list(t) if ".experts." in n], "the model has no experts"),
    "fp8": (
        lambda t: t.update({f"{EXPERT}.up_proj.weight": torch.zeros(128, 128, dtype=torch.float8_e4m3fn)}),
        "experts.2.up_proj.weight: expected a matrix in bfloat16, float16 or float32, got torch.float8_e4m3fn",
    ),
    "vector": (lambda t: t.update({f"{EXPERT}.up_proj.weight": torch.zeros(128)}), "expected a matrix"),
    "empty": (lambda t: t.update({f"{EXPERT}.up_proj.weight": torch.zeros(0, 128)}), "expected a matrix"),
    "gate and up of unequal size": (
        lambda t: t.update({f"{EXPERT}.up_proj.weight": torch.zeros(64, 128)}),
        "experts.2.up_proj: expected an intermediate size of 128 .* got 64",
    ),
    "transposed": (
        lambda t: t.update({f"{EXPERT}.up_proj.weight": torch.zeros(128, 64)}),
        "experts.2.up_proj: expected hidden_size=128 as one side",
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_find_experts_refuses_bad_tensors(model, name):
    edit, message = BAD_TENSORS[name]
    edit_tensors(model, edit)
    source = open_checkpoint(str(model))
    with pytest.raises(ValueError, match=message):
        find_experts(source)


BAD_CONFIGS = {
    "more experts": ({"num_experts": 5}, "expected 5 experts .* got none of 4.gate_proj.weight"),
    "fewer experts": ({"num_experts": 3}, "expected 3 experts .* got also 3.down_proj.weight"),
    "no number of experts": ({"num_experts": None}, "expected num_experts, got none"),
    "number not an integer": ({"num_experts": "4"}, "num_experts: expected a number of experts from 1 up, got '4'"),
    "no experts": ({"num_experts": 0}, "from 1 up, got 0"),
    "unknown architecture": ({"model_type": "new_moe"}, "model_type: expected one of mixtral, .* got 'new_moe'"),
    "model_type not a string": ({"model_type": ["qwen2_moe"]}, "model_type: expected one of"),
    "already quantized": (
        {"quantization_config": {"quant_method": "fp8"}},
        r"already quantized \(quant_method 'fp8'\): .* convert the original model",
    ),
    "quantization_config not an object": ({"quantization_config": "awq"}, "already quantized"),
    "no hidden_size": ({"hidden_size": None}, "expected hidden_size=None"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_find_experts_refuses_a_bad_config(model, name):
    changes, message = BAD_CONFIGS[name]
    edit_config(model, **changes)
    source = open_checkpoint(str(model))
    with pytest.raises(ValueError, match=message):
        find_experts(source)


def test_find_experts_refuses_a_dense_model(tiny_model):
    source = open_checkpoint(str(tiny_model("llama")))
    with pytest.raises(ValueError, match="'llama' is a dense model"):
        find_experts(source)


def test_find_experts_takes_the_key_of_hub_checkpoints_for_qwen3(tiny_model, tmp_path):
    import shutil

    path = shutil.copytree(tiny_model("qwen3_moe"), tmp_path / "model")
    edit_config(path, num_local_experts=None, num_experts=4)
    assert find_experts(open_checkpoint(str(path))).num_experts == 4
