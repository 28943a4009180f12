import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from alphaq_vllm import convert
from benchmarks.sizes import MODELS, Model, gigabytes, table
from tests.conftest import MODEL
from tests.offline.conftest import save_tiny_model
from tests.offline.source.test_families import edit_config, edit_tensors, prediction_layer

DEEPSEEK = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
# Of the published config.json of each model: what its size follows from.
CONFIGS = {
    "OLMoE-1B-7B": {
        "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
        "num_experts": 64, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50304,
    },
    "Qwen1.5-MoE-A2.7B": {
        "model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "num_hidden_layers": 24, "num_experts": 60, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 151936,
    },
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2", **DEEPSEEK, "q_lora_rank": None, "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "n_routed_experts": 64, "n_shared_experts": 2,
        "first_k_dense_replace": 1, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 102400,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_experts": 128, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
    },
    "Phi-3.5-MoE": {
        "model_type": "phimoe", "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32,
        "num_local_experts": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32064,
        "attention_bias": True, "lm_head_bias": True,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_local_experts": 8, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    },
    "Llama-4-Scout": {
        "model_type": "llama4",
        "text_config": {
            "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_hidden_layers": 48,
            "num_local_experts": 16, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 202048, "interleave_moe_layer_step": 1, "tie_word_embeddings": False,
        },
        "vision_config": {
            "hidden_size": 1408, "intermediate_size": 5632, "num_hidden_layers": 34, "num_attention_heads": 16,
            "image_size": 336, "patch_size": 14, "projector_input_dim": 4096, "projector_output_dim": 4096,
            "vision_output_dim": 4096,
        },
    },
    "GLM-4.5-Air": {
        "model_type": "glm4_moe", "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 46, "n_routed_experts": 128, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151552,
        "attention_bias": True, "use_qk_norm": False,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
        "num_local_experts": 128, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": 201088,
    },
    "MiniMax-M2": {
        "model_type": "minimax_m2", "hidden_size": 3072, "intermediate_size": 1536, "num_hidden_layers": 62,
        "num_local_experts": 256, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 200064,
    },
    "Qwen3-235B-A22B": {
        "model_type": "qwen3_moe", "hidden_size": 4096, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
        "num_experts": 128, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3", **DEEPSEEK, "q_lora_rank": 1536, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "n_routed_experts": 256, "n_shared_experts": 1,
        "first_k_dense_replace": 3, "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280,
    },
}  # fmt: skip
# Stored as parameters, but buffers in transformers: a bias of the router for each expert.
ROUTER_BIASES = {"GLM-4.5-Air": 46 * 128, "DeepSeek-V3": 59 * 256, "MiniMax-M2": 62 * 256}
# Left out by transformers: one decoder layer for multi-token prediction, the last one again with a projection of two
# inputs, norms of its own, and copies of the embedding and the head.
PREDICTION_LAYER = ("GLM-4.5-Air", "DeepSeek-V3")


def tensors(config):
    """The parameters of a model without memory, by name."""
    auto = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    config = {"tie_word_embeddings": False, **config}
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("model", [pytest.param(model, id=model.name) for model in MODELS])
def test_models_are_those_of_the_published_configs(model):
    config = CONFIGS[model.name]
    found = tensors(config)
    experts = sum(n for name, n in found.items() if ".experts." in name and not name.endswith("bias"))
    assert experts == model.num_expert_weights
    total = sum(found.values()) + ROUTER_BIASES.get(model.name, 0)
    assert model.draft_layers == (model.name in PREDICTION_LAYER)
    if model.name in PREDICTION_LAYER:
        last = f".layers.{config['num_hidden_layers'] - 1}."
        total += sum(n for name, n in found.items() if last in name)
        total += (2 * config["vocab_size"] + 2 * config["hidden_size"] + 3) * config["hidden_size"]
    assert total == model.num_parameters
    assert config.get("text_config", config)["num_attention_heads"] == model.num_heads


@pytest.mark.parametrize(("bits", "group_size"), [(3, 128), (2, 64), (4, 32)])
def test_nbytes_is_what_conversion_writes(bits, group_size, tmp_path):
    # From tests/models/docs-moe/README.md.
    model = Model("docs-moe", 3, 8, 128, 128, 4, 1_873_280)
    command = [sys.executable, "-m", "offline.convert", str(MODEL), str(tmp_path / "out"), "--mode", "uniform"]
    command += ["--bits", str(bits), "--group-size", str(group_size), "--quantizer", "mse"]
    subprocess.run(command, check=True)
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    header = int.from_bytes(shard.read_bytes()[:8], "little")
    assert model.nbytes(bits, group_size) == shard.stat().st_size - 8 - header


def test_nbytes_has_layers_that_draft_as_conversion_writes_them(tmp_path):
    source = tmp_path / "source"
    save_tiny_model("glm4_moe", source)
    edit_config(source, num_nextn_predict_layers=1)
    edit_tensors(source, lambda tensors: tensors.update(prediction_layer("model.layers.2")))
    convert(source, tmp_path / "out", bits=3, mode="uniform", quantizer="mse")
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    written = sum(tensor.nbytes for name, tensor in load_file(shard).items() if ".experts." in name)
    # Of both layers, and nothing else.
    model = Model("experts of GLM-4.5", 1, 4, 128, 128, 4, 2 * 4 * 3 * 128 * 128, draft_layers=1)
    assert model.nbytes(3, 64) == written


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param("Mixtral-8x7B", 16, id="all that are asked about"),
        pytest.param("Qwen1.5-MoE-A2.7B", 4, id="11 groups of 128"),
        pytest.param("gpt-oss-120b", 2, id="45 groups of 64"),
        pytest.param("Llama-4-Scout", 8, id="40 heads"),
    ],
)
def test_max_ranks_share_columns_and_heads(name, ranks):
    (model,) = (model for model in MODELS if model.name == name)
    assert model.max_ranks == ranks


def test_gigabytes_have_three_digits():
    assert [gigabytes(n) for n in (3_960_000_000, 99_949_999_999, 99_950_000_000)] == ["4.0", "99.9", "100"]


def test_table_has_a_line_for_each_model():
    assert [line.split("|")[1].strip() for line in table()[2:]] == [model.name for model in MODELS]
