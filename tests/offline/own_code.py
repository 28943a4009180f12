"""Families whose code comes with the model: tiny ones, of what transformers writes of models that are built alike.

Their config has the fields of the published ones, and the code beside it stands in for theirs: it keeps whatever a
config says.
"""

import json

import torch

# Of which model transformers writes what lies in each family's checkpoint under other names.
WRITTEN_AS = {
    "deepseek": "glm4_moe",
    "bailing_moe": "glm4_moe",
    "bailing_moe_v2": "glm4_moe",
    "sarvam_moe": "glm4_moe",
    "bailing_hybrid": "deepseek_v3",
    "sarvam_mla": "deepseek_v3",
    "mimo_v2": "mimo_v2_flash",
}
_EXPERTS = {"moe_intermediate_size": 128, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "n_shared_experts": 1}  # fmt: skip
_HEADS = {**_EXPERTS, "head_dim": 32, "num_key_value_heads": 2, "first_k_dense_replace": 1}
# The sizes of heads for which vLLM has kernels.
_LATENT = {**_EXPERTS, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
CONFIGS = {
    "deepseek": {**_HEADS, "num_key_value_heads": 4},
    "bailing_moe": {**_HEADS, "first_k_dense_replace": 0},
    "bailing_moe_v2": {**_HEADS, "use_qk_norm": True},
    "sarvam_moe": {**_HEADS, "use_qk_norm": True},
    "bailing_hybrid": {**_LATENT, "q_lora_rank": 32, "first_k_dense_replace": 0},
    "sarvam_mla": {**_LATENT, "q_lora_rank": None, "first_k_dense_replace": 1},
    "mimo_v2": {"n_routed_experts": 4, "moe_intermediate_size": 128, "num_experts_per_tok": 2,
                "num_key_value_heads": 2, "head_dim": 32},
}  # fmt: skip
_BAILING = {"use_bias": False, "use_qkv_bias": False, "embedding_dropout": 0.0, "use_rmsnorm": True, "rope_theta": 1e4}
_CORRECTED = {"score_function": "sigmoid", "moe_router_enable_expert_bias": True, "norm_topk_prob": True,
              "routed_scaling_factor": 2.5}  # fmt: skip
# What published configs say beside sizes.
_SETTINGS = {
    "deepseek": {"architectures": ["DeepseekForCausalLM"], "scoring_func": "softmax", "norm_topk_prob": False,
                 "rope_theta": 1e4},
    "bailing_moe": {"architectures": ["BailingMoeForCausalLM"], **_BAILING, "norm_head": True, "norm_topk_prob": True},
    "bailing_moe_v2": {"architectures": ["BailingMoeV2ForCausalLM"], **_BAILING, **_CORRECTED, "use_qk_norm": True,
                       "router_dtype": "fp32", "partial_rotary_factor": 0.5},
    "sarvam_moe": {"architectures": ["SarvamMoEForCausalLM"], **_BAILING, **_CORRECTED, "use_qk_norm": True},
    "bailing_hybrid": {"architectures": ["BailingMoeV2_5ForCausalLM"], **_BAILING, **_CORRECTED, "use_qk_norm": True,
                       "router_dtype": "fp32", "layer_group_size": 2, "head_dim": 32, "group_norm_size": 2,
                       "linear_silu": False, "partial_rotary_factor": 0.5},
    "sarvam_mla": {"architectures": ["SarvamMLAForCausalLM"], **_CORRECTED, "rope_theta": 1e4, "router_dtype": "fp32",
                   # What vLLM caches of a token.
                   "head_dim": 576},
    "mimo_v2": {
        "architectures": ["MiMoV2ForCausalLM"], "attention_projection_layout": "fused_qkv",
        "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "layernorm_epsilon": 1e-5, "v_head_dim": 128,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 32, "swa_v_head_dim": 128,
        "sliding_window_size": 128, "add_swa_attention_sink_bias": True,
    },
}  # fmt: skip
# What those of Ling, Ring and Sarvam call it, by transformers' names.
KEYS = {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}
_CODE = """
from transformers import PretrainedConfig


class Own(PretrainedConfig):
    model_type = "{model_type}"
"""


def publish(model_type, tensors, config):
    """Tensors and config under published names, of those that transformers has written."""
    config = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_interleave")}
    if model_type == "mimo_v2":
        tensors = _joined(tensors, "qkv_proj")
    elif model_type == "deepseek":
        # Its router has no correction.
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("e_score_correction_bias")}
    else:
        config = {KEYS.get(key, key): value for key, value in config.items()}
        if model_type != "sarvam_mla":
            tensors = _bailing(model_type, tensors)
    return tensors, {**config, **_SETTINGS[model_type]}


def _joined(tensors, joined):
    """With queries, keys and values in one matrix."""
    parts = ("q_proj", "k_proj", "v_proj")
    fused = {
        name.replace("q_proj", joined): torch.cat([tensors[name.replace("q_proj", part)] for part in parts])
        for name in tensors
        if name.endswith(".q_proj.weight")
    }
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(tuple(f"{p}.weight" for p in parts))}
    return {**kept, **fused}


def _bailing(model_type, tensors):
    if model_type == "bailing_hybrid":
        tensors = _with_linear_attention(tensors)
    names = {
        "embed_tokens": "word_embeddings",
        "self_attn": "attention",
        "o_proj": "dense",
        "q_norm": "query_layernorm",
        "k_norm": "key_layernorm",
        "gate.e_score_correction_bias": "gate.expert_bias",
    }
    renamed = {}
    for name, tensor in _joined(tensors, "query_key_value").items():
        for own, published in names.items():
            name = name.replace(own, published)
        if model_type != "bailing_moe" or not name.endswith("expert_bias"):
            renamed[name] = tensor
    return renamed


def _with_linear_attention(tensors):
    """The first layer attends linearly, all heads with keys and values of their own."""
    attention = "model.layers.0.self_attn"
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(attention)}
    for part in ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj"):
        kept[f"{attention}.{part}.weight"] = torch.randn(128, 128, dtype=torch.bfloat16) / 8
    for part, size in (("q_norm", 32), ("k_norm", 32), ("g_norm", 128)):
        kept[f"{attention}.{part}.weight"] = torch.ones(size, dtype=torch.bfloat16)
    return kept


def add_config_code(folder, code=_CODE):
    """Give a model's config the name of a class, and the file that has it."""
    config = json.loads((folder / "config.json").read_bytes())
    config["auto_map"] = {"AutoConfig": "configuration_own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(code.format(model_type=config["model_type"]))
