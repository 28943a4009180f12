"""Layers for multi-token prediction: vLLM's draft model loads their experts, quantized or as they were."""

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model

from alphaq_vllm import convert, inspect, validate
from alphaq_vllm import dequantize as dequantize_checkpoint
from alphaq_vllm.format import PACKED, SCALE, ZERO
from alphaq_vllm.packing import dequantize
from alphaq_vllm.plugin.moe import AlphaQMoEMethod
from tests.offline.conftest import COMMON, CONFIGS
from tests.reliability.loading import one_rank

MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
SPECULATIVE = {"method": "mtp", "num_speculative_tokens": 1}


def save_model(folder):
    """A DeepSeek-V3 of two layers, and the one for prediction that follows them, made of the second's tensors."""
    options = {**COMMON, **CONFIGS["deepseek_v3"], **MLA, "topk_method": "noaux_tc"}
    config = AutoConfig.for_model("deepseek_v3", **options)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    layer, following = "model.layers.1.", "model.layers.2."
    tensors |= {name.replace(layer, following): t.clone() for name, t in tensors.items() if name.startswith(layer)}
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes = {"enorm": (hidden,), "hnorm": (hidden,), "eh_proj": (hidden, 2 * hidden), "embed_tokens": (vocab, hidden)}
    shapes |= {"shared_head.norm": (hidden,), "shared_head.head": (vocab, hidden)}
    for name, shape in shapes.items():
        tensors[f"{following}{name}.weight"] = torch.randn(shape, dtype=torch.bfloat16)
    save_file(tensors, path, {"format": "pt"})
    settings = json.loads((folder / "config.json").read_bytes())
    # In a process that has loaded a DeepSeek-V3.2, vLLM has given the class of the config that type.
    own = {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps({**settings, **own}))
    return tensors


def methods(model):
    return {type(m.quant_method) for m in model.modules() if type(m).__name__ == "RoutedExperts"}


def load_both(checkpoint, folder):
    """vLLM's model of a checkpoint, and the one that drafts for it."""
    arguments = EngineArgs(
        str(checkpoint), quantization="alphaq", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True,
        speculative_config=SPECULATIVE,
    )  # fmt: skip
    config = arguments.create_engine_config()
    with one_rank(folder), set_current_vllm_config(config):
        model = get_model(vllm_config=config)
        draft = get_model(vllm_config=config, model_config=config.speculative_config.draft_model_config)
    return model, draft


def test_layers_that_draft_load_quantized(tmp_path):
    source, checkpoint = tmp_path / "source", tmp_path / "checkpoint"
    tensors = save_model(source)
    summary = convert(source, checkpoint, bits=3, noise="measured", quantizer="mse", mtp_bits=5)
    assert (summary.matrices, summary.drafts, summary.draft_bits, summary.bits) == (12, 12, 5, 3)
    model, draft = load_both(checkpoint, tmp_path)
    assert methods(model) == methods(draft) == {AlphaQMoEMethod}
    stored = load_file(next(checkpoint.glob("*.safetensors")))
    (experts,) = (module for module in draft.modules() if type(module).__name__ == "RoutedExperts")
    module = "model.layers.2.mlp.experts"
    for expert in range(4):
        for projection, got in zip(("gate_proj", "up_proj"), experts.w13_weight_scale[expert], strict=True):
            assert torch.equal(got, stored[f"{module}.{expert}.{projection}.weight_scale"])
        assert torch.equal(experts.w2_weight_scale[expert, 0], stored[f"{module}.{expert}.down_proj.weight_scale"])
        name = f"{module}.{expert}.down_proj"
        weight = dequantize(*(stored[f"{name}.{suffix}"] for suffix in (PACKED, SCALE, ZERO)), 5)
        error = (weight - tensors[f"{name}.weight"]).square().mean() / tensors[f"{name}.weight"].square().mean()
        assert error < 0.003


def test_the_other_commands_know_layers_that_draft(tmp_path):
    source, checkpoint, plain = tmp_path / "source", tmp_path / "checkpoint", tmp_path / "plain"
    tensors = save_model(source)
    # By GPTQ where the model runs: what drafts is quantized by itself.
    convert(source, checkpoint, bits=3, calibration_tokens=512)
    errors = validate(checkpoint, source=source)["errors"]
    assert sum(error["matrices"] for error in errors.values()) == 24
    seen = inspect(checkpoint)
    assert (seen["matrices"], seen["bits"], seen["drafts"]) == (12, 3, {4: 12})
    dequantize_checkpoint(checkpoint, plain)
    restored = load_file(next(plain.glob("*.safetensors")))
    assert {name: tensor.shape for name, tensor in restored.items()} == {n: t.shape for n, t in tensors.items()}


def test_layers_that_draft_load_unquantized_beside_a_quantized_model(tmp_path):
    source, checkpoint = tmp_path / "source", tmp_path / "checkpoint"
    tensors = save_model(source)
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
