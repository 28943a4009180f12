"""Layers for multi-token prediction, which conversion keeps as they are: vLLM loads them beside quantized experts."""

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model

from alphaq_vllm import convert
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
    (folder / "config.json").write_text(json.dumps({**settings, "num_nextn_predict_layers": 1}))
    return tensors


def methods(model):
    return {type(m.quant_method) for m in model.modules() if type(m).__name__ == "RoutedExperts"}


def test_layers_that_draft_load_unquantized_beside_a_quantized_model(tmp_path):
    source, checkpoint = tmp_path / "source", tmp_path / "checkpoint"
    tensors = save_model(source)
    convert(source, checkpoint, bits=3, noise="measured", quantizer="mse")
    arguments = EngineArgs(
        str(checkpoint), quantization="alphaq", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True,
        speculative_config=SPECULATIVE,
    )  # fmt: skip
    config = arguments.create_engine_config()
    with one_rank(tmp_path), set_current_vllm_config(config):
        model = get_model(vllm_config=config)
        draft = get_model(vllm_config=config, model_config=config.speculative_config.draft_model_config)
    assert methods(model) == {AlphaQMoEMethod}
    assert AlphaQMoEMethod not in methods(draft)
    state = draft.state_dict()
    (name,) = (name for name in state if name.endswith("eh_proj.weight"))
    assert torch.equal(state[name], tensors["model.layers.2.eh_proj.weight"])
    (name,) = (name for name in state if name.endswith("experts.routed_experts.w2_weight"))
    # vLLM brings the weights into an order of its own.
    stored = tensors["model.layers.2.mlp.experts.3.down_proj.weight"]
    assert torch.equal(state[name][3].flatten().sort().values, stored.flatten().sort().values)
