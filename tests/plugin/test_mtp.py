"""Layers for multi-token prediction: vLLM's draft model loads their experts, quantized or as they were."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from vllm.model_executor.layers.fused_moe import config as layers_config

from alphaq_vllm import convert, inspect, plan, validate
from alphaq_vllm import dequantize as dequantize_checkpoint
from alphaq_vllm.format import GRID, PACKED, SCALE
from alphaq_vllm.packing import dequantize
from alphaq_vllm.plugin.moe import AlphaQMoEMethod
from offline.source.architectures import FAMILIES
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts
from tests.offline.conftest import has_head
from tests.plugin.drafting import DRAFTING, check_scales, left, load_both, load_without_device, methods
from tests.plugin.test_gpu_families import DSA, V4

# vLLM's classes that draft on NVIDIA's GPUs.
DSA_DRAFT = "vllm.models.deepseek_v32.nvidia.mtp", "DeepseekV32MTP"
V4_DRAFT = "vllm.models.deepseek_v4.nvidia.mtp", "DeepSeekV4MTP"
# Those that vLLM serves with kernels of GPUs alone, and its classes there where others are for CPUs.
ON_GPUS = [
    ("deepseek_v32", (None, None)), ("deepseek_v32", (DSA, DSA_DRAFT)), ("glm_moe_dsa", (None, None)),
    ("glm_moe_dsa", (DSA, DSA_DRAFT)), ("deepseek_v4", (V4, V4_DRAFT)), ("nemotron_h", (None, None)),
    ("minimax_m3_vl", (None, None)),
]  # fmt: skip
HERE = sorted(set(DRAFTING) - {model_type for model_type, _ in ON_GPUS})
# What it makes and does not load: V4's heads are filled up to a number that the kernels have.
UNUSED = {"deepseek_v4": {"model.layers.2.mtp_block.attn.attn_sink"}}
# Those that are published with the experts of a layer in two tensors too.
FUSED = ("qwen3_5_moe", "qwen3_5_moe_text")
# Modules that vLLM's code for models that see imports, and does not need to load weights.


@pytest.fixture(autouse=True)
def modules_apart(tmp_path, monkeypatch):
    """transformers copies code before it runs it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def converted(model_type, folder, head=False, **options):
    """A checkpoint of a tiny model that drafts, in default widths, and its tensors; head: whether that is quantized."""
    source, checkpoint = folder / "source", folder / "checkpoint"
    DRAFTING[model_type].write(model_type, source, **options)
    summary = convert(source, checkpoint, bits=3, quantizer="mse", head_bits=8 if head and has_head(source) else 16)
    matrices = 4 * len(FAMILIES[model_type].projections)
    assert (summary.drafts, summary.draft_bits, summary.bits) == (matrices, 4, 3)
    (weights,) = checkpoint.glob("*.safetensors")
    return checkpoint, load_file(weights)


@pytest.mark.parametrize(
    ("model_type", "fused"), [*((name, False) for name in HERE), *((name, True) for name in FUSED)]
)
def test_layers_that_draft_load_quantized(model_type, fused, tmp_path, sight):
    checkpoint, stored = converted(model_type, tmp_path, head=True, fused=fused)
    model, draft = load_both(checkpoint, tmp_path)
    assert methods(model) == methods(draft) == {AlphaQMoEMethod}
    check_scales(draft, stored, DRAFTING[model_type].module, FAMILIES[model_type].projections)


@pytest.mark.skipif(torch.cuda.is_available(), reason="attention on GPUs is not made for tiny sizes")
@pytest.mark.parametrize(("model_type", "places"), ON_GPUS)
def test_vllm_on_gpus_loads_layers_that_draft(model_type, places, tmp_path, monkeypatch, sight, stand_ins):
    if model_type == "nemotron_h":
        # vLLM refuses layers without a gate on CPUs.
        monkeypatch.setattr(layers_config, "current_platform", SimpleNamespace(is_cuda_alike=lambda: True))
    if model_type == "deepseek_v4":
        # Which kernel multiplies by `wo_a` in fp8, by the GPU.
        monkeypatch.setattr("vllm.models.deepseek_v4.nvidia.flashmla.compute_fp8_einsum_recipe", lambda: (None, False))
    checkpoint, stored = converted(model_type, tmp_path, head=True)
    model, draft = load_without_device(checkpoint, tmp_path, places)
    assert methods(model) == methods(draft) == {AlphaQMoEMethod}
    assert left(draft) == UNUSED.get(model_type, set())
    check_scales(draft, stored, DRAFTING[model_type].module, FAMILIES[model_type].projections)


def test_every_family_with_drafts_is_tried():
    assert set(DRAFTING) == {model_type for model_type, family in FAMILIES.items() if family.drafts}


def test_the_other_commands_know_layers_that_draft(tmp_path):
    source, checkpoint, plain = tmp_path / "source", tmp_path / "checkpoint", tmp_path / "plain"
    tensors = DRAFTING["deepseek_v3"].write("deepseek_v3", source)
    # By GPTQ where the model runs: what drafts is quantized by itself.
    convert(source, checkpoint, bits=3, calibration_tokens=512, mtp_bits=5)
    errors = validate(checkpoint, source=source)["errors"]
    assert sum(error["matrices"] for error in errors.values()) == 24
    seen = inspect(checkpoint)
    assert (seen["matrices"], seen["bits"], seen["drafts"]) == (12, 3, {5: 12})
    dequantize_checkpoint(checkpoint, plain)
    restored = load_file(next(plain.glob("*.safetensors")))
    assert {name: tensor.shape for name, tensor in restored.items()} == {n: t.shape for n, t in tensors.items()}
    stored = load_file(next(checkpoint.glob("*.safetensors")))
    for expert in range(4):
        name = f"model.layers.2.mlp.experts.{expert}.down_proj"
        weight = dequantize(*(stored[f"{name}.{suffix}"] for suffix in (PACKED, SCALE, GRID)), 5)
        error = (weight - tensors[f"{name}.weight"]).square().mean() / tensors[f"{name}.weight"].square().mean()
        assert error < 0.003


@pytest.mark.parametrize("model_type", ["deepseek_v4", "minimax_m3_vl", "nemotron_h"])
def test_the_other_commands_know_names_below_mtp(model_type, tmp_path):
    checkpoint, stored = converted(model_type, tmp_path)
    matrices = 4 * len(FAMILIES[model_type].projections)
    assert inspect(checkpoint)["drafts"] == {4: matrices}
    errors = validate(checkpoint, source=tmp_path / "source")["errors"]
    layers = len(find_experts(open_checkpoint(str(tmp_path / "source"))).modules)
    assert sum(error["matrices"] for error in errors.values()) == (layers + 1) * matrices
    sizes = {row["bits"]: row["size"] for row in plan(tmp_path / "source")["budgets"]}
    assert sizes[3] == sum(tensor.nbytes for tensor in stored.values())


def test_layers_that_draft_load_unquantized_beside_a_quantized_model(tmp_path):
    source, checkpoint = tmp_path / "source", tmp_path / "checkpoint"
    tensors = DRAFTING["deepseek_v3"].write("deepseek_v3", source)
    assert convert(source, checkpoint, bits=3, noise="measured", quantizer="mse", mtp_bits=16).drafts == 0
    model, draft = load_both(checkpoint, tmp_path)
    assert methods(model) == {AlphaQMoEMethod}
    assert AlphaQMoEMethod not in methods(draft)
    state = draft.state_dict()
    (name,) = (name for name in state if name.endswith("eh_proj.weight"))
    assert torch.equal(state[name], tensors["model.layers.2.eh_proj.weight"])
    (name,) = (name for name in state if name.endswith("experts.routed_experts.w2_weight"))
    # vLLM brings the weights into an order of its own.
    stored = tensors["model.layers.2.mlp.experts.3.down_proj.weight"]
    assert torch.equal(state[name][3].flatten().sort().values, stored.flatten().sort().values)


def test_documents_list_the_families():
    text = (Path(__file__).parents[2] / "docs/models.md").read_text()
    (listed,) = re.findall(r"Their experts\s+are quantized in (.+?): vLLM's class", text, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", listed)) == set(DRAFTING)
