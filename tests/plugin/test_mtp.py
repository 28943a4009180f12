"""Layers for multi-token prediction: vLLM's draft model loads their experts, quantized or as they were."""

import pytest
import torch
from safetensors.torch import load_file

from alphaq_vllm import convert, inspect, validate
from alphaq_vllm import dequantize as dequantize_checkpoint
from alphaq_vllm.format import PACKED, SCALE, ZERO
from alphaq_vllm.packing import dequantize
from alphaq_vllm.plugin.moe import AlphaQMoEMethod
from offline.source.architectures import FAMILIES
from tests.plugin.drafting import DRAFTING, check_scales, experts, load_both, methods

# vLLM's code for models that see imports torchvision.
TORCHVISION = ("qwen3_5_moe",)


def test_every_family_with_drafts_is_tried():
    assert set(DRAFTING) == {model_type for model_type, family in FAMILIES.items() if family.drafts}


@pytest.mark.parametrize("model_type", DRAFTING)
def test_layers_that_draft_load_quantized(model_type, tmp_path):
    if model_type in TORCHVISION:
        pytest.importorskip("torchvision")
    source, checkpoint = tmp_path / "source", tmp_path / "checkpoint"
    DRAFTING[model_type].save(model_type, source)
    summary = convert(source, checkpoint, bits=3, noise="measured", quantizer="mse")
    assert (summary.drafts, summary.draft_bits, summary.bits) == (12, 4, 3)
    model, draft = load_both(checkpoint, tmp_path)
    assert methods(model) == methods(draft) == {AlphaQMoEMethod}
    (layer,) = experts(draft)
    (weights,) = checkpoint.glob("*.safetensors")
    family = FAMILIES[model_type]
    module = f"{DRAFTING[model_type].layer}{family.below_layer.replace(chr(92), '')[1:]}.experts"
    check_scales(layer, load_file(weights), module, family.projections)


def test_the_other_commands_know_layers_that_draft(tmp_path):
    source, checkpoint, plain = tmp_path / "source", tmp_path / "checkpoint", tmp_path / "plain"
    tensors = DRAFTING["deepseek_v3"].save("deepseek_v3", source)
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
        weight = dequantize(*(stored[f"{name}.{suffix}"] for suffix in (PACKED, SCALE, ZERO)), 5)
        error = (weight - tensors[f"{name}.weight"]).square().mean() / tensors[f"{name}.weight"].square().mean()
        assert error < 0.003


def test_layers_that_draft_load_unquantized_beside_a_quantized_model(tmp_path):
    source, checkpoint = tmp_path / "source", tmp_path / "checkpoint"
    tensors = DRAFTING["deepseek_v3"].save("deepseek_v3", source)
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
