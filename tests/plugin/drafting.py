"""Tiny models with a layer for multi-token prediction under its published names, and vLLM's two models of each."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module

import torch
from safetensors.torch import load_file, save_file
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from alphaq_vllm.format import SCALE
from tests.offline.conftest import COMMON, save_tiny_model
from tests.offline.source.test_families import edit_config
from tests.plugin.test_published_names import DEEPSEEK_V4, save_deepseek_v4, save_minimax_m3
from tests.reliability.loading import engine_config, one_rank

SPECULATIVE = {"method": "mtp", "num_speculative_tokens": 1}
HIDDEN, VOCAB = COMMON["hidden_size"], COMMON["vocab_size"]
# What vLLM's kernels for latent attention ask for.
MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
ONE = {"num_nextn_predict_layers": 1}
ONE_OF_QWEN = {"mtp_num_hidden_layers": 1}


def _named(prefix, **shapes):
    return {f"{prefix}.{name.replace('__', '.')}.weight": shape for name, shape in shapes.items()}


_NORMS = {"enorm": (HIDDEN,), "hnorm": (HIDDEN,)}
_INPUTS = {**_NORMS, "eh_proj": (HIDDEN, 2 * HIDDEN)}
_HEAD = {"embed_tokens": (VOCAB, HIDDEN), "shared_head__norm": (HIDDEN,), "shared_head__head": (VOCAB, HIDDEN)}
_QWEN = {"fc": (HIDDEN, 2 * HIDDEN), "norm": (HIDDEN,), "pre_fc_norm_hidden": (HIDDEN,),
         "pre_fc_norm_embedding": (HIDDEN,)}  # fmt: skip


@dataclass(frozen=True)
class Drafting:
    """What a family publishes of layers for multi-token prediction.

    layers: what their names begin with, and the same of the decoder's layer that each resembles; own: shapes of the
    weights that no layer of the decoder has, by name; settings: of config.json, as published; save: writes a model
    without them; module: the name of the experts; lacking: parts of names that they have not, and the decoder's has.
    """

    layers: dict = field(default_factory=lambda: {"model.layers.2.": "model.layers.1."})
    own: dict = field(default_factory=lambda: _named("model.layers.2", **_INPUTS, **_HEAD))
    settings: dict = field(default_factory=lambda: ONE)
    save: Callable | None = None
    module: str = "model.layers.2.mlp.experts"
    lacking: tuple = ()

    def write(self, model_type, folder, fused=False):
        """Write a tiny model that has them, and return its tensors; fused: the experts that draft in two of these."""
        (self.save or partial(save_tiny_model, model_type))(folder)
        path, settings = folder / "model.safetensors", json.loads((folder / "config.json").read_bytes())
        decoder, tensors = load_file(path), {}
        for layer, like in self.layers.items():
            for name, tensor in decoder.items():
                if name.startswith(like) and not any(part in name for part in self.lacking):
                    tensors[layer + name.removeprefix(like)] = _other(tensor)
        tensors |= {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in self.own.items()}
        if fused:
            tensors = _fused(tensors, self.module)
        tensors |= decoder
        save_file(tensors, path, {"format": "pt"})
        part = {"text_config": {**settings["text_config"], **self.settings}} if "text_config" in settings else {}
        (folder / "config.json").write_text(json.dumps({**settings, **self.settings, **part}))
        return tensors


def _other(tensor):
    """Weights other than those of the decoder's layer; codes and powers of two of their kind."""
    return tensor.view(torch.uint8).roll(1, 0).view(tensor.dtype) if tensor.itemsize == 1 else 2 * tensor


def _fused(tensors, module):
    """The experts of a module in two tensors, gate above up."""
    parts = ("gate_proj", "up_proj", "down_proj")
    single = {part: [tensors.pop(f"{module}.{expert}.{part}.weight") for expert in range(4)] for part in parts}
    gate, up, down = (torch.stack(matrices) for matrices in single.values())
    return {**tensors, f"{module}.gate_up_proj": torch.cat([gate, up], 1), f"{module}.down_proj": down}


def _tiny(model_type, **options):
    return partial(save_tiny_model, model_type, **options)


# What vLLM reads of a published Ling-2.5, and its latent attention, with sizes that are defaults.
_BAILING = {"num_experts": 4, "num_shared_experts": 0, "layer_group_size": 1,
            "architectures": ["BailingMoeV2_5ForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_own.Own"}}  # fmt: skip
_LATENT = {"q_proj": (768, HIDDEN), "kv_a_proj_with_mqa": (576, HIDDEN), "kv_a_layernorm": (512,),
           "kv_b_proj": (1024, 512), "dense": (HIDDEN, 512)}  # fmt: skip
CODE = """
from transformers import PretrainedConfig


class Own(PretrainedConfig):
    pass
"""


def save_bailing_hybrid(folder):
    """A Ling-2.5 with code for its config, which keeps all that is written there, as the published code does."""
    save_tiny_model("bailing_hybrid", folder)
    path = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if ".attention." not in name}
    for layer in range(2):
        shapes = _named(f"model.layers.{layer}.attention", **_LATENT)
        tensors |= {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, path, {"format": "pt"})
    edit_config(folder, **_BAILING, **MLA, q_lora_rank=None)
    (folder / "configuration_own.py").write_text(CODE)


def _qwen(like="model.layers.1.", settings=ONE_OF_QWEN):
    return Drafting({"mtp.layers.0.": like}, _named("mtp", **_QWEN), settings, module="mtp.layers.0.mlp.experts")


_DEEPSEEK = {**ONE, "topk_method": "noaux_tc"}
_M3 = "language_model.model.mtp.layers.0"
_V4 = {**ONE, "compress_ratios": [*DEEPSEEK_V4["compress_ratios"], 0]}
DRAFTING = {
    "bailing_hybrid": Drafting(
        own=_named("model.layers.2", **_INPUTS, final_layernorm=(HIDDEN,)), save=save_bailing_hybrid
    ),
    "deepseek_v3": Drafting(settings=_DEEPSEEK, save=_tiny("deepseek_v3", **MLA)),
    "deepseek_v32": Drafting(settings=_DEEPSEEK),
    "glm_moe_dsa": Drafting(
        # The second layer has no indexer of its own.
        {"model.layers.2.": "model.layers.1.", "model.layers.2.self_attn.": "model.layers.0.self_attn."},
        settings=_DEEPSEEK,
    ),
    "glm4_moe": Drafting(),
    "glm4_moe_lite": Drafting(settings=_DEEPSEEK, save=_tiny("glm4_moe_lite", **MLA)),
    "hy_v3": Drafting(
        own=_named("model.layers.2", **_INPUTS, final_layernorm=(HIDDEN,)),
        settings={**ONE, "expert_hidden_dim": 128, "route_norm": True, "qk_norm": True},
    ),
    "qwen3_next": _qwen(settings=ONE),
    "qwen3_5_moe": _qwen("model.language_model.layers.1."),
    "qwen3_5_moe_text": _qwen(),
    "nemotron_h": Drafting(
        {"mtp.layers.0.": "backbone.layers.1.", "mtp.layers.1.": "backbone.layers.3."},
        _named("mtp.layers.0", **_INPUTS) | _named("mtp.layers.1", final_layernorm=(HIDDEN,)),
        {**ONE, "mtp_hybrid_override_pattern": "*E"},
        module="mtp.layers.1.mixer.experts",
    ),
    "deepseek_v4": Drafting(
        {"mtp.0.": "layers.1."},
        _named("mtp.0", **_NORMS, e_proj=(HIDDEN, HIDDEN), h_proj=(HIDDEN, HIDDEN), norm=(HIDDEN,))
        | {"mtp.0.hc_head_fn": (2, 2 * HIDDEN), "mtp.0.hc_head_base": (2,), "mtp.0.hc_head_scale": (1,)}
        | _named("mtp.0", emb__tok_emb=(VOCAB, HIDDEN), head=(VOCAB, HIDDEN)),
        _V4, save_deepseek_v4, "mtp.0.ffn.experts", (".compressor.", ".indexer."),
    ),
    "minimax_m3_vl": Drafting(
        {f"{_M3}.transformer_layer.": "language_model.model.layers.1."},
        _named(_M3, **_INPUTS, final_layernorm=(HIDDEN,)),
        {"num_mtp_modules": 1}, save_minimax_m3, f"{_M3}.transformer_layer.block_sparse_moe.experts",
    ),
}  # fmt: skip


def engine(checkpoint):
    """The config of an engine that drafts."""
    options = {"max_model_len": 64, "skip_tokenizer_init": True, "speculative_config": SPECULATIVE}
    options["trust_remote_code"] = "auto_map" in json.loads((checkpoint / "config.json").read_bytes())
    return engine_config(checkpoint, verify=False, **options)


def load_both(checkpoint, folder):
    """vLLM's model of a checkpoint, and the one that drafts for it."""
    config = engine(checkpoint)
    with one_rank(folder), set_current_vllm_config(config):
        model = get_model(vllm_config=config)
        draft = get_model(vllm_config=config, model_config=config.speculative_config.draft_model_config)
    return model, draft


def load_without_device(checkpoint, folder, places=(None, None)):
    """The same for a device that is not here, and none of what its kernels make of weights; places: of the classes."""
    config = engine(checkpoint)
    (weights,) = checkpoint.glob("*.safetensors")
    models, configs = [], (config.model_config, config.speculative_config.draft_model_config)
    with one_rank(folder), set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        for place, own in zip(places, configs, strict=True):
            kind = getattr(import_module(place[0]), place[1]) if place else None
            model = initialize_model(vllm_config=config, model_class=kind, model_config=own)
            for tensor in model.parameters():
                tensor.data.fill_(torch.nan if tensor.is_floating_point() else 0)
            model.load_weights(load_file(weights).items())
            models.append(model)
    return models


def left(model):
    """The names of parameters that were not loaded, of a model that had nothing but NaN."""
    return {name for name, tensor in model.named_parameters() if tensor.is_floating_point() and tensor.isnan().any()}


def experts(model):
    """The layers of routed experts of one of vLLM's models."""
    return [module for module in model.modules() if isinstance(module, RoutedExperts)]


def methods(model):
    """How the routed experts of one of vLLM's models are computed."""
    return {type(layer.quant_method) for layer in experts(model)}


def check_scales(model, stored, module, projections):
    """Each expert of the only layer has the scales of its own that are stored of a module."""
    (layer,) = experts(model)
    for expert, (of_w13, of_w2) in enumerate(
        zip(getattr(layer, f"w13_{SCALE}"), getattr(layer, f"w2_{SCALE}"), strict=True)
    ):
        for projection, got in zip(projections, (*of_w13, *of_w2), strict=True):
            assert torch.equal(got, stored[f"{module}.{expert}.{projection}.{SCALE}"])
