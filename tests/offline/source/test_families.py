"""Finding the experts: every family as transformers writes it, and every way in which they can be wrong."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline.source.architectures import FAMILIES
from offline.source.checkpoint import SINGLE, open_checkpoint
from offline.source.families import find_experts

EXPERT = "model.layers.1.mlp.experts.2"
FIRST_LAYER_DENSE = (
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_linear", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa",
    "lfm2_moe", "jamba", "ernie4_5_moe", "hy_v3", "afmoe", "exaone_moe", "dots1", "mimo_v2_flash", "laguna", "axk1",
    "minimax_m3_vl", "step3p5", "step3p7", "dots3_note",
    "deepseek", "bailing_moe_v2", "mimo_v2", "sarvam_moe", "sarvam_mla",
)  # fmt: skip


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
    layers = 1 if model_type in FIRST_LAYER_DENSE else 2
    assert len(experts.modules) == layers
    family = FAMILIES[model_type]
    number = layers * 4 * len(family.projections)
    assert len(experts.matrices) == len({matrix.name for matrix in experts.matrices}) == number
    kept = {name for module in experts.modules for name in family.kept_tensors(module)}
    named = re.compile(r"(?!talker\.|vision_encoder\.).*(\.experts\.|moe\.(input|output)_linear|\.moe\.\w+_proj)")
    assert {matrix.tensor for matrix in experts.matrices} == set(filter(named.match, source.tensors)) - kept


def test_find_experts_orders_layers_and_experts_by_number(tmp_path):
    module = "model.layers.{}.mlp.experts"
    tensors = {
        f"{module.format(layer)}.{expert}.{name}.weight": torch.zeros(shape)
        for layer in (10, 2)
        for expert in range(11)
        for name, shape in {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}.items()
    }
    save_file(tensors, tmp_path / SINGLE)
    config = {"model_type": "olmoe", "num_experts": 11, "hidden_size": 32, "num_hidden_layers": 12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    experts = find_experts(open_checkpoint(str(tmp_path)))
    assert experts.modules == [module.format(2), module.format(10)]
    assert [m.expert for m in experts.matrices] == [e for _ in range(2) for e in range(11) for _ in range(3)]
    assert [m.projection for m in experts.matrices[:3]] == ["gate_proj", "up_proj", "down_proj"]
    assert [m.shape for m in experts.matrices[:3]] == [(64, 32), (64, 32), (32, 64)]


BAD_TENSORS = {
    "expert missing": (
        lambda t: [t.pop(f"{EXPERT}.{p}.weight") for p in ("gate_proj", "up_proj", "down_proj")],
        "expected 4 experts .* got none of experts.2.gate_proj.weight, experts.2.up_proj.weight, experts.2.down",
    ),
    "projection missing": (lambda t: t.pop(f"{EXPERT}.up_proj.weight"), "got none of experts.2.up_proj.weight"),
    "bias": (lambda t: t.update({f"{EXPERT}.up_proj.bias": torch.zeros(128)}), "got also experts.2.up_proj.bias"),
    "some fused, some not": (
        lambda t: t.update({"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(4, 256, 128)}),
        "got none of experts.down_proj, but experts.0.down_proj.weight",
    ),
    "layer twice": (
        lambda t: t.update({"model.layers.01.mlp.experts.0.up_proj.weight": torch.zeros(128, 128)}),
        "model.layers.01.mlp: expected 4 experts .* got only 1 tensors",
    ),
    "layer after the last": (
        lambda t: t.update({"model.layers.2.mlp.experts.0.up_proj.weight": torch.zeros(128, 128)}),
        "model.layers.2.mlp: expected layers up to 1 as config.json says",
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
    "more experts": ({"num_experts": 5}, "expected 5 experts .* got none of experts.4.gate_proj.weight"),
    "fewer experts": ({"num_experts": 3}, "expected 3 experts .* got also experts.3.down_proj.weight"),
    "no number of experts": ({"num_experts": None}, "expected num_experts or num_local_experts or .*, got none"),
    "two numbers of experts": ({"n_routed_experts": 8}, "expected one number of experts, got {'num_experts': 4, 'n_"),
    "no number of layers": ({"num_hidden_layers": None}, "num_hidden_layers: expected a number of layers from 1 up"),
    "absurdly many experts": ({"num_experts": 10**12}, "expected 1000000000000 experts .* got only 12 tensors"),
    "nested but nothing in it": ({"text_config": {}}, "expected num_experts or .*, got none"),
    "number not an integer": ({"num_experts": "4"}, "num_experts: expected a number of experts from 1 up, got '4'"),
    "no experts": ({"num_experts": 0}, "from 1 up, got 0"),
    "model_type not a string": ({"model_type": ["qwen2_moe"]}, "model_type: expected one of"),
    "already quantized": (
        {"quantization_config": {"quant_method": "exl3"}},
        r"already quantized \(quant_method 'exl3'\): .* convert the original model",
    ),
    "already quantized in text_config": (
        {"text_config": {"quantization_config": {"quant_method": "bitsandbytes"}}},
        r"already quantized \(quant_method 'bitsandbytes'\)",
    ),
    "awq for kernels of few tokens": (
        {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemv"}},
        r"already quantized \(quant_method 'awq, 4 bits, version gemv'\)",
    ),
    "auto-round of several widths": (
        {
            "quantization_config": {
                "quant_method": "auto-round",
                "bits": 4,
                "packing_format": "auto_round:auto_gptq",
                "extra_config": {
                    "model.layers.0.mlp.gate": {"bits": 16},
                    "model.layers.0.self_attn.q_proj": {"bits": 8},
                },
            }
        },
        r"already quantized \(quant_method 'auto-round, int of 4 and 8 bits, format auto_round:auto_gptq'\)",
    ),
    "auto-round in its own layout": (
        {"quantization_config": {"quant_method": "intel/auto-round", "bits": 2, "backend": "auto_round:exllamav2"}},
        r"already quantized \(quant_method 'intel/auto-round, int of 2 bits, format auto_round:exllamav2'\)",
    ),
    "quark of 4 bits in integers": (
        {
            "quantization_config": {
                "quant_method": "quark",
                "global_quant_config": {"weight": {"dtype": "uint4", "qscheme": "per_group", "group_size": 128}},
            }
        },
        r"already quantized \(quant_method 'quark, weights of uint4 per_group 128'\)",
    ),
    "quark of two scales": (
        {"quantization_config": {"quant_method": "quark", "global_quant_config": {"weight": [{"dtype": "fp4"}, {}]}}},
        r"already quantized \(quant_method 'quark, weights of several scales'\)",
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
    path = shutil.copytree(tiny_model("qwen3_moe"), tmp_path / "model")
    edit_config(path, num_local_experts=None, num_experts=4)
    assert find_experts(open_checkpoint(str(path))).num_experts == 4


def prediction_layer(name):
    """The tensors of a layer for multi-token prediction."""
    pairs = [(expert, projection) for expert in range(4) for projection in ("gate_proj", "up_proj", "down_proj")]
    experts = {f"{name}.mlp.experts.{e}.{projection}.weight": torch.ones(128, 128) for e, projection in pairs}
    return {f"{name}.enorm.weight": torch.ones(128), **experts}


@pytest.mark.parametrize(
    ("model_type", "layer"),
    [("deepseek_v3", "model.layers.2"), ("glm4_moe", "model.layers.2"), ("qwen3_next", "mtp.layers.0")],
)
def test_find_experts_leaves_prediction_layers_alone(tiny_model, tmp_path, model_type, layer):
    path = shutil.copytree(tiny_model(model_type), tmp_path / "model")
    without = find_experts(open_checkpoint(str(path)))
    edit_config(path, num_nextn_predict_layers=1)
    edit_tensors(path, lambda tensors: tensors.update(prediction_layer(layer)))
    assert find_experts(open_checkpoint(str(path))) == without


def test_find_experts_accepts_declared_prediction_layers_that_are_absent(tiny_model, tmp_path):
    path = shutil.copytree(tiny_model("deepseek_v3"), tmp_path / "model")
    without = find_experts(open_checkpoint(str(path)))
    edit_config(path, num_nextn_predict_layers=1)
    assert find_experts(open_checkpoint(str(path))) == without
