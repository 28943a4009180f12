"""Tiny models of every family, written by transformers itself."""

import json
import re
import shutil
import sys
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from offline.__main__ import main
from offline.source.checkpoint import open_checkpoint
from offline.source.recognition import family_of
from tests.offline import own_code

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
SHARED = {
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
DEEPSEEK = {**SHARED, **MLA}
HYBRID = {
    **EXPERTS,
    "shared_expert_intermediate_size": 128,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
QWEN_VISION = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 128}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256}
LLAMA4 = {
    **LOCAL,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 128,
    "interleave_moe_layer_step": 1,
    "head_dim": 32,
    "attention_chunk_size": 64,
}
LLAMA_VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "vision_output_dim": 64,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "image_size": 28,
    "patch_size": 14,
}
NEMOTRON = {
    "layers_block_type": ["moe", "full_attention", "linear_attention", "moe"],
    "moe_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "n_groups": 2,
    "chunk_size": 16,
}
NEMOTRON_OMNI = ("nemotron_h_omni", "NemotronH_Nano_Omni_Reasoning_V3")
ONE_GROUP = {"n_group": 1, "topk_group": 1}
# Attention to the tokens that an indexer chooses.
SPARSE = {**DEEPSEEK, **ONE_GROUP, "q_lora_rank": 32, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8}
KIMI = {"num_experts": 4, "moe_intermediate_size": 128, "num_experts_per_token": 2, "first_k_dense_replace": 1}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 32}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
GEMMA4 = {
    **SLIDING,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 128,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
}
DEEPSEEK_V4 = {
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_hash_layers": 1,
    "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
    "q_lora_rank": 32,
    "o_lora_rank": 32,
    "o_groups": 2,
    "hc_mult": 2,
    # vLLM's kernels have these sizes alone.
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "index_n_heads": 64,
    "index_head_dim": 128,
}
VISION = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
MINIMAX_M3 = {
    "head_dim": 32,
    "mlp_layer_types": ["dense", "sparse"],
    "layer_types": ["full_attention", "minimax_m3_sparse"],
    "dense_intermediate_size": 128,
    "shared_intermediate_size": 256,
    "rotary_dim": 16,
    "index_n_heads": 4,
    "index_head_dim": 32,
}
STEP = {
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_intermediate_size": 128,
    "share_expert_dim": 128,
    "head_dim": 32,
    "moe_layers_enum": "1",
    "sliding_window": 128,
    # Small enough to matter.
    "swiglu_limits": [0.0, 0.01],
}
AUDIO = {
    "d_model": 64,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "downsample_hidden_size": 32,
    "output_dim": 128,
    "num_mel_bins": 16,
}
NOTE = {
    "layer_types": ["full_attention", "sliding_attention"],
    "attention_gate_type": "headwise",
    "apply_mla_qkv_lora_rescale": True,
    "sliding_window_size": 128,
    "swa_attention_gate_type": "headwise",
    "swa_num_attention_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_qk_rope_head_dim": 16,
    "swa_v_head_dim": 32,
    "swa_rope_theta": 10000.0,
}
OWN_CODE = tuple(own_code.CONFIGS)
CONFIGS = {
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 128},
    "qwen3_moe": {**EXPERTS, "head_dim": 32},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**DEEPSEEK, "q_lora_rank": None},
    "deepseek_v3": {**DEEPSEEK, "q_lora_rank": 32, "n_group": 1, "topk_group": 1},
    "qwen3_next": HYBRID,
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_moe": {"text_config": {**COMMON, **HYBRID}, "vision_config": QWEN_VISION},
    "glm4_moe": {**SHARED, **ONE_GROUP, "head_dim": 32},
    "phimoe": {"num_local_experts": 4},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
    "granitemoe": LOCAL,
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 128},
    "gpt_oss": {**LOCAL, "head_dim": 32, "layer_types": ["full_attention", "full_attention"]},
    "llama4_text": LLAMA4,
    "llama4": {"text_config": {**COMMON, **LLAMA4}, "vision_config": LLAMA_VISION},
    **dict.fromkeys(("nemotron_h", *NEMOTRON_OMNI), NEMOTRON),
    "kimi_k2": {**DEEPSEEK, "q_lora_rank": 32, "n_group": 1, "topk_group": 1},
    "deepseek_v32": SPARSE,
    # The second layer attends to what the first one's indexer chooses.
    "glm_moe_dsa": {**SPARSE, "index_topk_freq": 2, "index_skip_topk_offset": 1},
    "glm4_moe_lite": {**DEEPSEEK, **ONE_GROUP, "q_lora_rank": 32, "mlp_layer_types": ["dense", "sparse"]},
    "axk1": {**DEEPSEEK, **ONE_GROUP, "q_lora_rank": 32},
    "deepseek_v4": DEEPSEEK_V4,
    "minimax_m3_vl": {
        "text_config": {**COMMON, **LOCAL, **MINIMAX_M3},
        "vision_config": {**VISION, "image_size": 28},
        "projector_hidden_size": 64,
    },
    "qwen3_omni_moe": {
        "thinker_config": {
            "text_config": {**COMMON, **EXPERTS, "head_dim": 32, "rope_scaling": {"mrope_section": [4, 6, 6]}},
            "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
            "audio_config": AUDIO,
        },
        "enable_audio_output": False,
    },
    "step3p5": {"text_config": {**COMMON, **STEP}, "vision_config": VISION},
    "step3p7": {"text_config": {**COMMON, **STEP}, "vision_config": VISION},
    "dots3_note": SPARSE,
    "dots1": {**SHARED, **ONE_GROUP, "head_dim": 32},
    "solar_open": {**SHARED, **ONE_GROUP, "head_dim": 32},
    "gemma4_text": GEMMA4,
    "gemma4": {
        "text_config": {**COMMON, **GEMMA4},
        "vision_config": {**VISION, "head_dim": 32, "global_head_dim": 32},
        "audio_config": None,
    },
    "kimi_linear": {**KIMI, **MLA, "linear_num_heads": 4, "linear_head_dim": 32},
    "lfm2_moe": {**EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {**LOCAL, "shared_intermediate_size": 128, **MAMBA, "layer_types": ["mamba", "attention"]},
    "granitemoe_swa": {**LOCAL, "shared_intermediate_size": 128},
    "jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "mamba_d_state": 8,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 128,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
        "moe_num_shared_experts": 1,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 32},
    "hy_v3": {**EXPERTS, "first_k_dense_replace": 1, "head_dim": 32},
    "afmoe": {**EXPERTS, **SLIDING, "num_dense_layers": 1, "num_shared_experts": 1},
    "exaone_moe": {
        **EXPERTS,
        **ONE_GROUP,
        **SLIDING,
        "num_shared_experts": 1,
        "mlp_layer_types": ["dense", "sparse"],
        "first_k_dense_replace": 1,
    },
    "cohere2_moe": {**EXPERTS, **SLIDING, "num_shared_experts": 1},
    "mellum": {**EXPERTS, "head_dim": 32},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "mimo_v2_flash": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 128,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "laguna": {**EXPERTS, "head_dim": 32, "shared_expert_intermediate_size": 128},
    "qwen3_vl_moe": {
        # With 128 the shapes would not tell how the experts lie.
        "text_config": {**COMMON, **EXPERTS, "head_dim": 32, "moe_intermediate_size": 256},
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
    },
    **own_code.CONFIGS,
    "llama": {},
}
# Families that the converter cannot run: see ``why_not``.
WEIGHTS_ONLY = (*OWN_CODE, *NEMOTRON_OMNI, "deepseek_v4", "minimax_m3_vl", "step3p5", "qwen3_omni_moe",
                "dots3_note")  # fmt: skip
# Types of model that transformers does not know, and one whose tensors have the same names.
WRITTEN_AS = {"kimi_k2": "deepseek_v3", "step3p5": "step3p7", "dots3_note": "deepseek_v32",
              **dict.fromkeys(NEMOTRON_OMNI, "nemotron_h"), **own_code.WRITTEN_AS}  # fmt: skip


def _deepseek_v4(tensors, config):
    names = {name: name.removeprefix("model.").replace("embed_tokens.", "embed.") for name in tensors}
    names = {name: own.replace("hc_head.hc_", "hc_head_").replace(".attn.norm.", ".attn.kv_norm.")
             for name, own in names.items()}  # fmt: skip
    return {names[name]: tensor for name, tensor in tensors.items()}, config


def _dense(tensors, config):
    """A first layer without experts, whose block is named otherwise."""
    dense = "layers.0.block_sparse_moe."
    return {name.replace(dense, "layers.0.mlp."): tensor for name, tensor in tensors.items()}, config


def _step3p5(tensors, config):
    """The language model of a Step-3.7 alone."""
    own = {**config["text_config"], "architectures": ["Step3p5ForCausalLM"]}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("vi")}, own


def _qwen3_omni(tensors, config):
    """With an expert of the second model, which speaks."""
    spoken = {"talker.model.layers.0.mlp.experts.0.gate_proj.weight": torch.ones(32, 16)}
    return {**tensors, **spoken}, config


def transposed(tensors, config):
    """Fused experts with their sides exchanged."""
    fused = {name: tensor.mT.contiguous() for name, tensor in tensors.items()
             if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}  # fmt: skip
    return {**tensors, **fused}, config


def _nemotron_omni(tensors, config):
    """A Nemotron beside encoders, of which here is one tensor."""
    seen = {"vision_model.radio_model.model.blocks.0.norm1.weight": torch.ones(64)}
    own = {"architectures": ["NemotronH_Nano_Omni_Reasoning_V3"], "llm_config": config}
    return {**{f"language_model.{name}": tensor for name, tensor in tensors.items()}, **seen}, own


def _dots3_note(tensors, config):
    """With gates of attention, without an indexer where attention slides, and experts of the encoder."""
    tensors = {name: tensor for name, tensor in tensors.items() if not re.search(r"layers\.1\..*\.indexer\.", name)}
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        tensors[f"{attention}.g_proj.weight"] = torch.randn(4, 128, dtype=torch.bfloat16)
        tensors[f"{attention}.k_rope_only_layernorm.weight"] = torch.ones(16, dtype=torch.bfloat16)
    tensors["vision_encoder.blocks.0.mlp.experts.0.up_proj.weight"] = torch.ones(32, 16)
    return tensors, {**config, **NOTE, "architectures": ["Dots3NoteForCausalLM"]}


# What is published, of the tensors and the config that transformers saves.
PUBLISHED = {"deepseek_v4": _deepseek_v4, "kimi_linear": _dense, "minimax_m3_vl": _dense,
             "qwen3_omni_moe": _qwen3_omni, "qwen3_vl_moe": transposed,
             "step3p5": _step3p5, "dots3_note": _dots3_note,
             **dict.fromkeys(NEMOTRON_OMNI, _nemotron_omni),
             **{name: partial(own_code.publish, name) for name in OWN_CODE}}  # fmt: skip


def config_class(model_type):
    """transformers' own, also where vLLM has put another in its place, as it does for this process in other tests."""
    return getattr(transformers, CONFIG_MAPPING_NAMES[model_type])


def save_tiny_model(model_type, folder, **others):
    """Write a tiny bfloat16 model of a family, in one file, under its published names.

    others: options of its config, in place of those here; of a model that does not see or speak.
    """
    torch.manual_seed(0)
    options, auto = {**COMMON, **CONFIGS[model_type], **others}, transformers.AutoModelForCausalLM
    if "vision_config" in options:
        options, auto = CONFIGS[model_type], transformers.AutoModelForImageTextToText
    elif "thinker_config" in options:
        options, auto = CONFIGS[model_type], transformers.AutoModelForMultimodalLM
    config = config_class(WRITTEN_AS.get(model_type, model_type))(**options)
    model = auto.from_config(config, dtype=torch.bfloat16)
    for name, bias in model.named_parameters():
        if name.endswith("_proj_bias"):
            # transformers makes them zeros.
            torch.nn.init.normal_(bias, std=0.1)
    model.save_pretrained(folder)
    rename(folder, model_type)


def rename(folder, model_type):
    """Give a model that transformers has written the type and the names under which it is published."""
    weights, settings = folder / "model.safetensors", folder / "config.json"
    config = json.loads(settings.read_bytes())
    if model_type in PUBLISHED:
        tensors, config = PUBLISHED[model_type](load_file(weights), config)
        save_file(tensors, weights, {"format": "pt"})
    # vLLM gives some of transformers' classes another type.
    settings.write_text(json.dumps({**config, "model_type": model_type}))


def has_head(source):
    """Whether a model has a head that can be quantized."""
    opened = open_checkpoint(str(source))
    return not family_of(opened).plain_head and any(name.endswith("lm_head.weight") for name in opened.tensors)


def publish(folder, settings):
    """Write settings into the config of a model, also into parts of it."""
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(_with(config, settings)))


def _with(config, settings):
    parts = {key: _with(config[key], own) for key, own in settings.items()
             if isinstance(own, dict) and isinstance(config.get(key), dict)}  # fmt: skip
    return {**config, **settings, **parts}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """``tiny_model(model_type)``: the directory of a model by ``save_tiny_model``, not to be changed."""
    made = {}

    def make(model_type):
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp("models") / model_type
            save_tiny_model(model_type, made[model_type])
        return made[model_type]

    return make


@pytest.fixture(scope="session")
def latent_model(tmp_path_factory):
    """The directory of a tiny Nemotron whose experts compute on projections of 64 features, not to be changed."""
    torch.manual_seed(0)
    options = {**COMMON, **NEMOTRON, "moe_latent_size": 64, "moe_intermediate_size": 192}
    # Large enough for the experts to matter.
    options["initializer_range"] = 0.1
    config = transformers.AutoConfig.for_model("nemotron_h", **options)
    path = tmp_path_factory.mktemp("models") / "latent"
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


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


@pytest.fixture
def alphaq(monkeypatch, capsys):
    """``alphaq(*arguments)``: the exit status, standard output and standard error of the console script."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["alphaq", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
        except SystemExit as ended:
            return (ended.code or 0, *capsys.readouterr())
        return (0, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def speaking_model(tiny_model, tmp_path_factory):
    """``speaking_model(model_type)``: a tiny model with a tokenizer, not to be changed."""
    made = {}

    def make(model_type):
        if model_type not in made:
            path = tmp_path_factory.mktemp("models") / model_type
            made[model_type] = add_tokenizer(shutil.copytree(tiny_model(model_type), path))
        return made[model_type]

    return make


def add_tokenizer(path):
    """A tokenizer with one token for each byte."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file to calibrate on, not to be changed."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, 0123456789 times. " * 60)
    return path
