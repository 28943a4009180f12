"""Families whose published names differ from those of transformers: vLLM's own class loads what is converted."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.fused_moe import RoutedExperts

from alphaq_vllm import convert
from alphaq_vllm.format import GRID, SCALE
from alphaq_vllm.plugin.moe import AlphaQMoEMethod
from tests.offline.conftest import save_tiny_model
from tests.offline.source.test_families import edit_config
from tests.reliability.loading import empty_model, one_rank

# What vLLM reads of published configs, where transformers writes something else.
DEEPSEEK_V4 = {
    "compress_ratios": [128, 4],
    "compress_rope_theta": 160000,
    "expert_dtype": "fp4",
    "num_hash_layers": 1,
    "max_position_embeddings": 4096,
    "rope_scaling": {
        "type": "yarn", "factor": 16, "original_max_position_embeddings": 256, "beta_fast": 32, "beta_slow": 1
    },
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
POWERS = torch.float8_e8m0fnu


def save_deepseek_v4(folder):
    """A DeepSeek-V4 with experts in 4 bits, and linear layers in 8, as it is published."""
    save_tiny_model("deepseek_v4", folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        rows, columns = tensor.shape if tensor.ndim == 2 else (0, 0)
        if ".experts." in name:
            tensors[name] = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8)
            scale = torch.randint(118, 124, (rows, columns // 32), dtype=torch.uint8).view(POWERS)
        elif any(f".{part}." in name for part in ("wq_a", "wq_b", "attn.wkv", "wo_a", "wo_b", "shared_experts")):
            tensors[name] = (tensor * 8).to(torch.float8_e4m3fn)
            scale = torch.full((-(-rows // 128), -(-columns // 128)), 0.125).to(POWERS)
        else:
            tensors[name] = tensor.float() if "hc_" in name or name.endswith(("attn_sink", "gate.bias")) else tensor
            continue
        tensors[name.replace(".weight", ".scale")] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_bytes())
    for key in ("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters"):
        del settings[key]
    settings |= {**DEEPSEEK_V4, "quantization_config": FP8}
    (folder / "config.json").write_text(json.dumps(settings))


def load_all(checkpoint, folder):
    """vLLM's model of a checkpoint, of which every parameter has been loaded."""
    (weights,) = checkpoint.glob("*.safetensors")
    stored = load_file(weights)
    with one_rank(folder):
        model = empty_model(checkpoint)
        loaded = model.load_weights(stored.items())
    assert loaded == {name for name, _ in model.named_parameters()}
    return model, stored


def check_experts(model, stored, projections):
    """Scales and grids of every expert lie where the kernels look for them.

    projections: the checkpoint's names of gate, up and down, or of up and down.
    """
    first = f".0.{projections[0]}.{SCALE}"
    modules = {number(name): name.partition(first)[0] for name in stored if first in name}
    layers = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    assert {number(layer.quant_method.prefix) for layer in layers} == set(modules)
    for layer in layers:
        assert isinstance(layer.quant_method, AlphaQMoEMethod)
        module = modules[number(layer.quant_method.prefix)]
        for suffix in (SCALE, GRID):
            for expert, (of_w13, of_w2) in enumerate(
                zip(getattr(layer, f"w13_{suffix}"), getattr(layer, f"w2_{suffix}"), strict=True)
            ):
                for projection, got in zip(projections, (*of_w13, *of_w2), strict=True):
                    assert torch.equal(got, stored[f"{module}.{expert}.{projection}.{suffix}"])


def number(name):
    """Of the layer that a name is in."""
    return int(name.partition("layers.")[2].partition(".")[0])


def test_deepseek_v4(tmp_path, events):
    save_deepseek_v4(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", bits=3)
    model, stored = load_all(tmp_path / "out", tmp_path)
    check_experts(model, stored, ("w1", "w3", "w2"))
    # What is beside the experts is in bfloat16: vLLM looks at its dtype to choose how to multiply.
    assert torch.equal(model.model.layers[0].attn.wo_a.weight, stored["layers.0.attn.wo_a.weight"])
    assert model.model.layers[0].attn.wo_a.weight.dtype == torch.bfloat16


def test_linear_layers_of_deepseek_v4_are_refused_on_cpus(tmp_path, events):
    save_deepseek_v4(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", bits=3, linear_bits=4)
    message = r"layers\.0\.attn\.\w+: vLLM's model for this device renames weight_scale .*: serve on a GPU, or convert"
    with one_rank(tmp_path), pytest.raises(ValueError, match=message):
        empty_model(tmp_path / "out")


# What vLLM reads of Step's published configs, where transformers writes something else.
STEP = {
    "moe_num_experts": 4, "moe_top_k": 2, "num_attention_groups": 4, "moe_layers_enum": "1", "att_impl_type": "GQA",
    "use_head_wise_attn_gate": True, "use_moe_router_bias": True, "need_fp32_gate": True, "norm_expert_weight": True,
    "moe_router_activation": "sigmoid", "rope_theta": 10000.0, "swiglu_limits": [0.0, 7.0],
    "use_rope_layers": [True, True], "rope_parameters": None,
}  # fmt: skip


def test_step3p5(tmp_path):
    save_tiny_model("step3p5", tmp_path / "source")
    edit_config(tmp_path / "source", **STEP)
    convert(tmp_path / "source", tmp_path / "out", bits=3)
    model, stored = load_all(tmp_path / "out", tmp_path)
    check_experts(model, stored, ("gate_proj", "up_proj", "down_proj"))


# And of MiniMax-M3's.
MINIMAX_M3 = {
    "moe_layer_freq": [0, 1],
    "sparse_attention_config": {
        "use_sparse_attention": True, "sparse_index_dim": 32, "sparse_num_index_heads": 4, "sparse_topk_blocks": 16,
        "sparse_block_size": 128, "sparse_disable_index_value": [0, 1], "sparse_score_type": "max",
        "sparse_init_block": 0, "sparse_local_block": 1, "sparse_attention_freq": [0, 1],
    },
}  # fmt: skip


def save_minimax_m3(folder):
    """A MiniMax-M3 with the config that is published."""
    save_tiny_model("minimax_m3_vl", folder)
    settings = json.loads((folder / "config.json").read_bytes())
    text = {**settings["text_config"], **MINIMAX_M3, "model_type": "minimax_m3_text", "hidden_act": "swigluoai"}
    vision = {**settings["vision_config"], "img_token_compression_config": {}}
    edit_config(folder, text_config=text, vision_config=vision)


def test_minimax_m3(tmp_path, sight):
    save_minimax_m3(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", bits=3)
    model, stored = load_all(tmp_path / "out", tmp_path)
    check_experts(model, stored, ("w1", "w3", "w2"))


def test_qwen3_omni(tmp_path, sight):
    save_tiny_model("qwen3_omni_moe", tmp_path / "source")
    thinker = json.loads((tmp_path / "source/config.json").read_bytes())["thinker_config"]
    # What vLLM reads of a published config, where transformers writes something else.
    places = 48 * thinker["vision_config"]["patch_size"]
    thinker["vision_config"] |= {"image_size": places, "apply_vit_abs_pos_embed": True}
    thinker["text_config"] |= {"tie_word_embeddings": False}
    edit_config(tmp_path / "source", thinker_config=thinker)
    convert(tmp_path / "source", tmp_path / "out", bits=3)
    model, stored = load_all(tmp_path / "out", tmp_path)
    check_experts(model, stored, ("gate_proj", "up_proj", "down_proj"))
