"""Each family that vLLM reads in full precision: what it quantizes while loading is what conversion writes."""

import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.model_executor.layers.fused_moe import config as fused_moe_config
from vllm.model_executor.model_loader import get_model

import alphaq_vllm
from alphaq_vllm import convert
from benchmarks.models import AT_LOAD
from tests.conftest import MODEL
from tests.offline import own_code
from tests.offline.conftest import PUBLISHED as RENAMED
from tests.offline.conftest import publish, save_tiny_model
from tests.plugin.test_gpu_families import PUBLISHED
from tests.plugin.test_published_names import STEP
from tests.reliability.loading import engine_config, reload
from tests.serving.test_families import save_model

SETTINGS = {**PUBLISHED, "step3p5": STEP}
# Each pattern of names, and each kind of attention.
ALWAYS = (
    "qwen2_moe", "qwen3_moe", "qwen3_next", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "phimoe",
    "granitemoe", "granitemoeshared", "minimax_m2", "nemotron_h", "qwen3_5_moe_text",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def vllm(tmp_path_factory):
    """vLLM's process groups for a single rank."""
    alphaq_vllm.register()
    folder = tmp_path_factory.mktemp("vllm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALPHAQ_CACHE", str(folder / "cache"))
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        if not torch.cuda.is_available():
            # As vLLM's worker for CPUs has it.
            patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        yield folder
        cleanup_dist_env_and_memory()


def load(folder, **options):
    """vLLM's model, without an engine around it, and its config."""
    config = engine_config(folder, verify=True, skip_tokenizer_init=True, max_model_len=64, **options)
    with set_current_vllm_config(config):
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = f"{os.environ['ALPHAQ_CACHE']}-store"
        init_distributed_environment(1, 0, f"file://{store}", 0, backend)
        ensure_model_parallel_initialized(1, 1)
        return get_model(vllm_config=config), config


@pytest.mark.parametrize(
    "model_type", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.long) for name in AT_LOAD]
)
def test_loading_quantizes_to_what_conversion_writes(model_type, tmp_path, monkeypatch, stand_ins, request):
    if model_type == "nemotron_h":
        # vLLM refuses experts without a gate on CPUs, where its own kernels have none.
        platform = SimpleNamespace(is_cuda_alike=lambda: True, is_xpu=lambda: False)
        monkeypatch.setattr(fused_moe_config, "current_platform", platform)
    if model_type == "qwen3_5_moe_text":
        request.getfixturevalue("sight")
    source = tmp_path / "model"
    save = save_tiny_model if model_type in RENAMED else save_model
    save(model_type, source)
    publish(source, SETTINGS.get(model_type, {}))
    options = {}
    if model_type in own_code.CONFIGS:
        # transformers copies the code of a config before it runs it.
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        own_code.add_config_code(source)
        options = {"trust_remote_code": True}
    convert(source, tmp_path / "out", bits=3.5, group_size=64, noise="expert", quantizer="mse")
    overrides = {"quantization_config": {"quant_method": "alphaq", "bits": 3.5, "group_size": 64}}
    # First, because vLLM changes transformers' PhiMoE in a process that has loaded it, and the check needs it as it is.
    loaded = dict(load(source, hf_overrides=overrides, **options)[0].named_parameters())
    expected = dict(load(tmp_path / "out", **options)[0].named_parameters())
    assert all(name.endswith((".w13_weight", ".w2_weight")) for name in loaded.keys() ^ expected.keys())
    assert sum(name.endswith("_packed") for name in expected) >= 2
    for name, parameter in expected.items():
        assert torch.equal(parameter, loaded[name]), name


def test_reloading_quantizes_again_in_place():
    model, config = load(MODEL)
    parameters = {name: p for name, p in model.named_parameters() if ".experts." in name and "_weight_" in name}
    before = {name: (p.data_ptr(), p.clone()) for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.data.zero_()
    with set_current_vllm_config(config):
        reload(model, config, load_file(MODEL / "model.safetensors"))
    for name, (place, values) in before.items():
        parameter = model.get_parameter(name)
        assert parameter.data_ptr() == place
        assert torch.equal(parameter, values), name
