"""Families that vLLM serves on GPUs only, or at true sizes only: its own class loads what is converted.

What it builds on GPUs is built here too, with stand-ins for what that needs beside weights: nothing is computed.
"""

import sys
from importlib import import_module
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry
from vllm.utils.torch_utils import set_default_torch_dtype

from alphaq_vllm import convert
from alphaq_vllm.plugin.linear import AlphaQLinearMethod
from offline.source.architectures import FAMILIES
from tests.offline.conftest import publish, save_tiny_model
from tests.plugin.test_published_names import check_experts, save_deepseek_v4
from tests.reliability.loading import engine_config, one_rank

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="attention on GPUs is not made for tiny sizes")
# The classes for NVIDIA's GPUs.
DSA = "vllm.models.deepseek_v32.nvidia.model", "DeepseekV32ForCausalLM"
V4 = "vllm.models.deepseek_v4.nvidia.model", "DeepseekV4ForCausalLM"
KDA = {"kda_layers": [1, 2], "full_attn_layers": [], "head_dim": 32, "num_heads": 4, "short_conv_kernel_size": 4}
# By type of model, what vLLM reads of published configs where transformers writes something else.
PUBLISHED = {
    "deepseek_v32": {"topk_method": "noaux_tc"},
    "glm_moe_dsa": {"topk_method": "noaux_tc"},
    "kimi_linear": {"mla_use_nope": True, "linear_attn_config": KDA},
    "hy_v3": {"expert_hidden_dim": 128, "route_norm": True, "qk_norm": True},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "layernorm_epsilon": 1e-5, "v_head_dim": 128,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 32, "swa_v_head_dim": 128,
        "sliding_window_size": 128, "add_swa_attention_sink_bias": True,
    },
    "axk1": {"topk_method": "noaux_tc"},
    "qwen3_vl_moe": {"text_config": {"norm_topk_prob": True}},
    "dots3_note": {"topk_method": "noaux_tc"},
}  # fmt: skip
# A file beside the weights that vLLM reads.
BESIDE = {"dots3_note": ("added_tokens.json", '{"<|imgpad|>": 255}')}
LOADED = (
    *PUBLISHED, "jamba", "laguna", "dots1", "solar_open", "granitemoe_swa", "hunyuan_v1_moe", "exaone_moe", "mellum",
    "flex_olmo", "gemma4",
)  # fmt: skip
# vLLM's code for models that see imports torchvision.
TORCHVISION = ("gemma4", "qwen3_vl_moe")
# Modules that a build of vLLM for GPUs has.
KERNELS = ("vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface", "vllm.third_party.deep_gemm")
PREFILL = "vllm.v1.attention.backends.mla.prefill.flash_attn"
# Those that another class serves on GPUs than on CPUs.
ON_GPUS = ("deepseek_v32", "glm_moe_dsa")
# What vLLM makes and does not fill: it does not use it, or see below.
UNUSED = {
    "axk1": {"model.layers.0.post_mlp_layernorm.weight"},
    "laguna": {"model.layers.1.mlp.experts.routed_experts.e_score_correction_bias"},
}
# What it leaves out of checkpoints, quantized or not: Laguna is routed without its correction; the config here has no
# encoder.
DROPPED = {
    "laguna": "model.layers.1.mlp.experts.e_score_correction_bias",
    "dots3_note": "vision_encoder.blocks.0.mlp.experts.0.up_proj.weight",
}


class Prefill:
    """What vLLM makes to compute the attention of a prompt."""

    def __init__(self, *arguments, **options):
        pass


@pytest.fixture
def stand_ins(stand_ins, monkeypatch):
    """Those of other tests, and for what Dots3-Note's code imports."""
    # It imports kernels for GPUs, and vLLM looks at a class in another process before it builds one.
    for name in KERNELS:
        monkeypatch.setitem(sys.modules, name, MagicMock(__path__=[]))
    monkeypatch.setitem(sys.modules, PREFILL, SimpleNamespace(FlashAttnPrefillBackend=Prefill))
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())


def empty_model(checkpoint, place):
    """The model that a config asks for, of the class in a place, and in it nothing but NaN and zeros."""
    kind = getattr(import_module(place[0]), place[1]) if place else None
    config = engine_config(checkpoint, verify=False)
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        model = initialize_model(vllm_config=config, model_class=kind)
    for tensor in loadable(model).values():
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else 0)
    return model


def loadable(model):
    """What a model may load, by name: its parameters, and its buffers but for the scales of caches."""
    stored = {name for name in model.state_dict() if not name.endswith("_scale")}
    return dict(model.named_parameters()) | {name: buffer for name, buffer in model.named_buffers() if name in stored}


def bytes_of_codes(tensors):
    """How many bytes of each value there are in tensors of integers, wherever they lie."""
    codes = [tensor.flatten().view(torch.uint8) for tensor in tensors.values() if not tensor.is_floating_point()]
    return torch.bincount(torch.cat(codes), minlength=256)


@pytest.mark.parametrize(
    ("model_type", "place"), [*((model_type, None) for model_type in LOADED), *((name, DSA) for name in ON_GPUS)]
)
def test_vllm_loads_every_tensor_of_what_is_converted(model_type, place, tmp_path, stand_ins, request):
    if model_type in TORCHVISION:
        request.getfixturevalue("sight")
    save_tiny_model(model_type, tmp_path / "source")
    publish(tmp_path / "source", PUBLISHED.get(model_type, {}))
    if model_type in BESIDE:
        name, text = BESIDE[model_type]
        (tmp_path / "source" / name).write_text(text)
    convert(tmp_path / "source", tmp_path / "out", bits=3, group_size=64, noise="expert", quantizer="mse")
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    stored = load_file(weights)
    with one_rank(tmp_path):
        model = empty_model(tmp_path / "out", place)
        model.load_weights(stored.items())
    tensors = loadable(model)
    left = {name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.isnan().any()}
    assert left == UNUSED.get(model_type, set())
    # Nothing is left over.
    numel = sum(tensor.numel() for name, tensor in tensors.items() if name not in left)
    assert numel == sum(tensor.numel() for name, tensor in stored.items() if name != DROPPED.get(model_type))
    assert torch.equal(bytes_of_codes(tensors), bytes_of_codes(stored))
    check_experts(model, stored, FAMILIES[model_type].projections)


@pytest.mark.parametrize("linear_bits", [4, 8])
def test_vllm_loads_linear_layers_of_deepseek_v4(linear_bits, tmp_path, stand_ins, monkeypatch):
    # Which kernel multiplies by `wo_a` in fp8, by the GPU.
    monkeypatch.setattr("vllm.models.deepseek_v4.nvidia.flashmla.compute_fp8_einsum_recipe", lambda: (None, False))
    save_deepseek_v4(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", bits=3, linear_bits=linear_bits)
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    stored = load_file(weights)
    with one_rank(tmp_path):
        model = empty_model(tmp_path / "out", V4)
        model.load_weights(stored.items())
    left = {name for name, tensor in loadable(model).items() if tensor.is_floating_point() and tensor.isnan().any()}
    # Its heads are filled up to a number that the kernels have.
    assert left == {f"model.layers.{layer}.attn.attn_sink" for layer in range(2)}
    methods = {name: module.quant_method for name, module in model.named_modules() if isinstance(module, LinearBase)}
    quantized = {name for name, method in methods.items() if isinstance(method, AlphaQLinearMethod)}
    attention = {f"attn.{name}" for name in ("fused_wqa_wkv", "wq_b", "wo_b")}
    shared = {f"ffn.shared_experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert quantized == {f"model.layers.{layer}.{name}" for layer in range(2) for name in attention | shared}
    # vLLM multiplies by it with code of its own.
    assert model.model.layers[0].attn.wo_a.weight.dtype == torch.bfloat16
