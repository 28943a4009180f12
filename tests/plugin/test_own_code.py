"""Families whose published config has code: vLLM's own class loads what is converted.

The code here stands in for theirs: it keeps whatever a config says, as they do; of models that also see, text apart.
"""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from vllm.model_executor.layers.fused_moe import config as layers_config
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models import registry
from vllm.model_executor.models.mimo_v2 import _shard_fp8_qkv_proj

from alphaq_vllm import convert
from alphaq_vllm.format import PACKED
from alphaq_vllm.plugin.linear import AlphaQLinearMethod
from offline.source.architectures import FAMILIES
from offline.source.checkpoint import SINGLE, open_checkpoint
from tests.offline import own_code
from tests.offline.conftest import NEMOTRON_OMNI, add_tokenizer, save_tiny_model
from tests.offline.source.quantized.test_mimo import save_mimo
from tests.offline.source.test_families import edit_config
from tests.plugin.test_published_names import STEP, check_experts
from tests.reliability.loading import empty_model, one_rank

CODE = """
from transformers import AutoConfig, PretrainedConfig


class Part(PretrainedConfig):
    pass


class Own(PretrainedConfig):
    def __init__(self, text_config=None, llm_config=None, vision_config=None, **kwargs):
        text = text_config or llm_config or {}
        kind = text.get("model_type", "")
        self.text_config = AutoConfig.for_model(**text) if kind == "nemotron_h" else Part(**text)
        self.vision_config = Part(**(vision_config or {}))
        super().__init__(**kwargs)

    def get_text_config(self, *arguments, **options):
        return self.text_config
"""
# What vLLM reads of the two configs, where transformers' classes keep something else or nothing.
SEEN_BY_STEP = {
    "width": 64, "layers": 1, "heads": 2, "mlp_ratio": 8960 / 1536, "image_size": 728, "patch_size": 14,
    "use_cls_token": False, "use_abs_posemb": True, "use_rope2d": True, "use_ln_pre": True, "use_ln_post": False,
    "ls_init_value": 0.1, "hidden_act": "quick_gelu", "output_dim": None,
}  # fmt: skip
SEEN_BY_NEMOTRON = {
    "force_image_size": 32, "patch_size": 16, "template": "", "downsample_ratio": 0.5, "ps_version": "v2",
    "image_tag_type": "internvl", "vit_hidden_size": 64, "projector_hidden_size": 64, "norm_mean": [0.5] * 3,
    "norm_std": [0.5] * 3, "vision_config": {"args": {"model": "vit_small_patch16_224"}},
}  # fmt: skip


def add_code(source, **settings):
    """Give a model a config that names its code, and the code."""
    edit_config(source, **settings, auto_map={"AutoConfig": "configuration_own.Own"})
    (source / "configuration_own.py").write_text(CODE)


@pytest.fixture(autouse=True)
def modules_apart(tmp_path, monkeypatch):
    """transformers copies code before it runs it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def empty(checkpoint, **options):
    """vLLM's model of a checkpoint, and in it nothing but NaN and zeros."""
    model = empty_model(checkpoint, trust_remote_code=True, **options)
    for tensor in model.parameters():
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else 0)
    return model


def left(model):
    """The names of parameters that were not loaded."""
    return {name for name, tensor in model.named_parameters() if tensor.is_floating_point() and tensor.isnan().any()}


def test_step3p7(tmp_path, sight):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny_model("step3p7", source)
    text = json.loads((source / "config.json").read_bytes())["text_config"]
    text |= {**STEP, "architectures": ["Step3p5ForCausalLM"], "attention_other_setting": None}
    add_code(source, text_config=text, vision_config=SEEN_BY_STEP, projector_bias=False, understand_projector_stride=2)
    convert(source, out, bits=3)
    (weights,) = out.glob("*.safetensors")
    stored = load_file(weights)
    with one_rank(tmp_path):
        model = empty(out)
        model.load_weights(stored.items())
    assert not left(model)
    check_experts(model, stored, ("gate_proj", "up_proj", "down_proj"))


@pytest.mark.parametrize("model_type", NEMOTRON_OMNI)
def test_nemotron_omni(model_type, tmp_path, monkeypatch, sight):
    # vLLM refuses layers without a gate on CPUs.
    monkeypatch.setattr(layers_config, "current_platform", SimpleNamespace(is_cuda_alike=lambda: True))
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny_model(model_type, source)
    add_tokenizer(source)
    add_code(source, **SEEN_BY_NEMOTRON)
    convert(source, out, bits=3)
    (weights,) = out.glob("*.safetensors")
    stored = load_file(weights)
    with one_rank(tmp_path):
        # Without its encoders, of which the checkpoint has next to nothing.
        model = empty(out, limit_mm_per_prompt={"image": 0, "video": 0, "audio": 0})
        model.load_weights(stored.items())
    assert not left(model.language_model)
    check_experts(model, stored, ("up_proj", "down_proj"))


@pytest.fixture
def loaded_model(tmp_path, monkeypatch):
    """``loaded_model(model_type, **options)``: vLLM's model of what is converted, the names it loaded, the tensors."""
    # vLLM looks at a class in another process before it builds one.
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())

    def make(model_type, **options):
        source, out = tmp_path / "source", tmp_path / "out"
        save_tiny_model(model_type, source)
        own_code.add_config_code(source)
        convert(source, out, bits=3, **options)
        (weights,) = out.glob("*.safetensors")
        stored = load_file(weights)
        with one_rank(tmp_path):
            model = empty(out)
            loaded = model.load_weights(stored.items())
        assert not left(model)
        return model, loaded, stored

    return make


@pytest.mark.parametrize("model_type", own_code.CONFIGS)
def test_language_models(model_type, loaded_model):
    model, loaded, stored = loaded_model(model_type)
    assert loaded == {name for name, _ in model.named_parameters()}
    # Nothing is left over.
    assert sum(tensor.numel() for tensor in model.parameters()) == sum(tensor.numel() for tensor in stored.values())
    check_experts(model, stored, FAMILIES[model_type].projections)


@pytest.mark.parametrize("model_type", own_code.CONFIGS)
def test_linear_layers_of_language_models(model_type, loaded_model):
    model, _, stored = loaded_model(model_type, linear_bits=8)
    quantized = {
        name
        for name, module in model.named_modules()
        if isinstance(module, LinearBase) and isinstance(module.quant_method, AlphaQLinearMethod)
    }
    names = [name.removesuffix(f".{PACKED}") for name in stored if name.endswith(PACKED) and ".experts." not in name]
    assert quantized == {re.sub(r"(gate|up)_proj$", "gate_up_proj", name) for name in names} != set()


def test_attention_of_mimo_v2_in_float8(tmp_path):
    """It is converted to what vLLM makes of it itself when it serves float8."""
    save_mimo(tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_bytes())
    stored, read = load_file(tmp_path / "source" / SINGLE), open_checkpoint(str(tmp_path / "source"))
    for layer, prefix in enumerate(("", "swa_")):
        name = f"model.layers.{layer}.self_attn.qkv_proj.weight"
        heads = {key: config[f"{prefix}{key}"] for key in ("head_dim", "v_head_dim")}
        counts = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}
        heads |= {key: config[f"{prefix}{own}"] for key, own in counts.items()}
        ranks = {"tp_rank": 0, "tp_size": 1, "ckpt_tp": config["num_key_value_heads"]}
        codes, scale = _shard_fp8_qkv_proj(stored[name], stored[f"{name}_scale_inv"], **heads, **ranks)
        by_vllm = codes.float() * scale.repeat_interleave(128, 0)[: codes.shape[0]]
        # vLLM rounds to float8 once more.
        torch.testing.assert_close(read.load(name).float(), by_vllm, rtol=0.07, atol=0.02)
