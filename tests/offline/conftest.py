"""Tiny models of every family, written by transformers itself."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

COMMON = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}
MLA = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
DEEPSEEK = {
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    **MLA,
}
CONFIGS = {
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 128},
    "qwen3_moe": {**EXPERTS, "head_dim": 32},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**DEEPSEEK, "q_lora_rank": None},
    "deepseek_v3": {**DEEPSEEK, "q_lora_rank": 32, "n_group": 1, "topk_group": 1},
    "llama": {},
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """``tiny_model(model_type)``: the directory of a tiny bfloat16 model in one file, not to be changed."""
    made = {}

    def make(model_type):
        if model_type not in made:
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(model_type, **COMMON, **CONFIGS[model_type])
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            made[model_type] = tmp_path_factory.mktemp("models") / model_type
            model.save_pretrained(made[model_type])
        return made[model_type]

    return make


@pytest.fixture(scope="session")
def sharded_model(tiny_model, tmp_path_factory):
    """The directory of the tiny Qwen2-MoE in three files with an index, not to be changed."""
    path = shutil.copytree(tiny_model("qwen2_moe"), tmp_path_factory.mktemp("models") / "sharded")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i in range(3):
        shard = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, path / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(names[i::3], shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny Qwen2-MoE, to be damaged."""
    return shutil.copytree(tiny_model("qwen2_moe"), tmp_path / "model")


@pytest.fixture
def sharded(sharded_model, tmp_path):
    """A copy of the sharded model, to be damaged."""
    return shutil.copytree(sharded_model, tmp_path / "sharded")
