"""Tiny models with a layer for multi-token prediction under its published names, and vLLM's two models of each."""

import json
from dataclasses import dataclass, field

import torch
from safetensors.torch import load_file, save_file
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.model_loader import get_model

from alphaq_vllm.format import SCALE, ZERO
from tests.offline.conftest import COMMON, save_tiny_model
from tests.reliability.loading import engine_config, one_rank

SPECULATIVE = {"method": "mtp", "num_speculative_tokens": 1}
HIDDEN, VOCAB = COMMON["hidden_size"], COMMON["vocab_size"]
# What vLLM's kernels for latent attention ask for.
MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
NORM = (HIDDEN,)
INPUTS = {"enorm": NORM, "hnorm": NORM, "eh_proj": (HIDDEN, 2 * HIDDEN)}
EMBEDDINGS = {"embed_tokens": (VOCAB, HIDDEN), "shared_head.norm": NORM, "shared_head.head": (VOCAB, HIDDEN)}
QWEN = {"fc": (HIDDEN, 2 * HIDDEN), "norm": NORM, "pre_fc_norm_hidden": NORM, "pre_fc_norm_embedding": NORM}
ONE = {"num_nextn_predict_layers": 1}


@dataclass(frozen=True)
class Drafting:
    """What a family publishes of a layer for multi-token prediction.

    layer: what its names begin with; like: the same of the decoder's layer that it resembles; own: shapes of the
    weights that only it has, by name; beside: what the names of these begin with, if it is not the layer; settings: of
    config.json, as published; options: of the tiny model, where vLLM asks for other sizes.
    """

    layer: str = "model.layers.2."
    like: str = "model.layers.1."
    own: dict = field(default_factory=lambda: {**INPUTS, **EMBEDDINGS})
    beside: str = ""
    settings: dict = field(default_factory=lambda: ONE)
    options: dict = field(default_factory=dict)

    def save(self, model_type, folder):
        """Write a tiny model that has it, and return its tensors."""
        save_tiny_model(model_type, folder, **self.options)
        path, settings = folder / "model.safetensors", json.loads((folder / "config.json").read_bytes())
        tensors = load_file(path)
        for name, tensor in list(tensors.items()):
            if name.startswith(self.like):
                # Other than those of the decoder's layer.
                tensors[self.layer + name.removeprefix(self.like)] = 2 * tensor
        for name, shape in self.own.items():
            tensors[f"{self.beside or self.layer}{name}.weight"] = torch.randn(shape, dtype=torch.bfloat16)
        save_file(tensors, path, {"format": "pt"})
        part = {"text_config": {**settings["text_config"], **self.settings}} if "text_config" in settings else {}
        (folder / "config.json").write_text(json.dumps({**settings, **self.settings, **part}))
        return tensors


_DEEPSEEK = {"settings": {**ONE, "topk_method": "noaux_tc"}}
_QWEN = {"layer": "mtp.layers.0.", "own": QWEN, "beside": "mtp."}
DRAFTING = {
    "deepseek_v3": Drafting(**_DEEPSEEK, options=MLA),
    "glm4_moe": Drafting(),
    "glm4_moe_lite": Drafting(**_DEEPSEEK, options=MLA),
    "hy_v3": Drafting(
        own={**INPUTS, "final_layernorm": NORM},
        settings={**ONE, "expert_hidden_dim": 128, "route_norm": True, "qk_norm": True},
    ),
    "qwen3_next": Drafting(**_QWEN),
    "qwen3_5_moe": Drafting(
        **_QWEN, like="model.language_model.layers.1.", settings={"mtp_num_hidden_layers": 1}
    ),
    "qwen3_5_moe_text": Drafting(**_QWEN, settings={"mtp_num_hidden_layers": 1}),
}


def load_both(checkpoint, folder):
    """vLLM's model of a checkpoint, and the one that drafts for it."""
    config = engine_config(
        checkpoint, verify=False, max_model_len=64, skip_tokenizer_init=True, speculative_config=SPECULATIVE
    )
    with one_rank(folder), set_current_vllm_config(config):
        model = get_model(vllm_config=config)
        draft = get_model(vllm_config=config, model_config=config.speculative_config.draft_model_config)
    return model, draft


def experts(model):
    """The layers of routed experts of one of vLLM's models."""
    return [module for module in model.modules() if isinstance(module, RoutedExperts)]


def methods(model):
    """How the routed experts of one of vLLM's models are computed."""
    return {type(layer.quant_method) for layer in experts(model)}


def check_scales(layer, stored, module, projections):
    """Each expert of a layer has the scales and zero points of its own that are stored of a module."""
    for suffix in (SCALE, ZERO):
        for expert, (of_w13, of_w2) in enumerate(
            zip(getattr(layer, f"w13_{suffix}"), getattr(layer, f"w2_{suffix}"), strict=True)
        ):
            for projection, got in zip(projections, (*of_w13, *of_w2), strict=True):
                assert torch.equal(got, stored[f"{module}.{expert}.{projection}.{suffix}"])
