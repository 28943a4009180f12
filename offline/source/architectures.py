"""What is known about each architecture with routed experts: to support another one, add a row to ``FAMILIES``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from offline.source.fused import FusedLayout, FusedPart

_NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
# What transformers and vLLM compute in.
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Layers for multi-token prediction that are numbered after the decoder's.
FOLLOWING = "following"
_MTP_LAYERS_KEYS = ("num_nextn_predict_layers", "num_mtp_modules")


@dataclass(frozen=True)
class Family:
    """How an architecture names its routed experts.

    block: pattern of the MoE blocks, each with a module ``experts``; projections: gate, up and down, or up and down of
    experts without a gate, in this order, by the names that vLLM loads; fused: how the experts lie in a block with
    fused tensors; individual: whether transformers also reads one tensor per matrix; kept: tensors of a block's experts
    that are not quantized; dense: what stands in place of a block in a layer without experts, where transformers would
    save another name than is published, which vLLM reads; prefixes: what else the names of layers may begin with, for
    vLLM and transformers to load them; drafts: pattern of the MoE blocks of layers for multi-token prediction, or
    ``FOLLOWING``, if vLLM's draft model takes their experts quantized; built_as: the type of model that transformers
    builds, if it does not know this one by name; unbuilt: whether transformers cannot tell what a checkpoint must hold,
    because it has the config alone, or saves other names than it loads, or has no causal language model of it;
    own_code: whether the config's code comes with the model, because neither transformers nor vLLM has it, or vLLM
    reads more than transformers' class keeps; unnamed: what in a layer vLLM builds of linear layers without names, so
    that it cannot ask how they are quantized; plain_head: whether it builds the head so, or does not ask for it at all.
    """

    block: str
    projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    fused: FusedLayout = field(default_factory=FusedLayout)
    individual: bool = True
    kept: tuple[str, ...] = ()
    dense: str = ""
    prefixes: tuple[str, ...] = ()
    drafts: str = ""
    built_as: str | None = None
    unbuilt: bool = False
    own_code: bool = False
    unnamed: str = ""
    plain_head: bool = False

    @property
    def module(self) -> str:
        """Pattern of the modules of experts."""
        return rf"{self.block}\.experts"

    @property
    def gated(self) -> bool:
        """Whether experts have a gate."""
        return len(self.projections) == 3

    @property
    def down(self) -> str:
        """The projection whose input is the intermediate one."""
        return self.projections[-1]

    @property
    def prefix(self) -> str:
        """What the names of layers begin with, with a dot."""
        return self.block.partition("layers")[0].replace("\\", "")

    @property
    def below_layer(self) -> str:
        """Pattern of the name of a block below its layer, with a dot before it; empty if that is the layer itself."""
        return self.block.partition(r"\d+")[2]

    def under(self, prefix: str) -> Family:
        """The same with names of layers that begin with ``prefix``."""
        return replace(self, block=rf"{re.escape(prefix)}layers\.\d+{self.below_layer}")

    @property
    def drafting(self) -> Family:
        """The same with the blocks of layers for multi-token prediction, if these have names of their own."""
        return self if self.drafts in ("", FOLLOWING) else replace(self, block=self.drafts)

    def block_of(self, layer: int | str) -> str:
        """The name of a layer's block."""
        return self.block.replace(r"\d+", str(layer)).replace("\\", "")

    @property
    def example(self) -> str:
        """The name of a tensor of experts."""
        own = f"experts.0.{self.projections[0]}.weight" if self.individual else self.fused.gate_up
        return f"{self.block_of(0)}.{own}"

    def part(self, module: str, projection: str) -> FusedPart:
        """Where a projection of a module's experts lies in a block with fused tensors."""
        if self.gated:
            tensor, half = self.fused.place(self.projections.index(projection))
        else:
            tensor, half = self.fused.down if projection == self.down else self.fused.gate_up, None
        return FusedPart(_below_block(module, tensor), self.fused, half)

    def native_part(self, module: str, projection: str) -> FusedPart | None:
        """The same if fused tensors are all that transformers reads of this family, else None."""
        return None if self.individual else self.part(module, projection)

    def kept_tensors(self, module: str) -> set[str]:
        """The tensors beside a module's experts that are not quantized."""
        return {_below_block(module, name) for name in self.kept}


def _below_block(module: str, name: str) -> str:
    return module.removesuffix("experts") + name


_MLP = Family(r"model\.layers\.\d+\.mlp")
_MTP_MLP = r"mtp\.layers\.\d+\.mlp"
_MLP_AND_DRAFTS = replace(_MLP, drafts=FOLLOWING)
# Serving reads either, because models that also see are published with the longer names.
_TEXT_OF_VISION = replace(_MLP, prefixes=("model.language_model.",))
_VISION = replace(_MLP, block=r"model\.language_model\.layers\.\d+\.mlp")
_OWN_CODE = replace(_MLP, own_code=True)
_W1_W3_W2 = Family(r"model\.layers\.\d+\.block_sparse_moe", projections=("w1", "w3", "w2"))
_GRANITE = Family(
    r"model\.layers\.\d+\.block_sparse_moe",
    fused=FusedLayout(gate_up="input_linear.weight", down="output_linear.weight"),
    individual=False,
)
_FEED_FORWARD = Family(r"model\.layers\.\d+\.feed_forward")
_LLAMA4 = replace(_FEED_FORWARD, fused=FusedLayout(transposed=True), individual=False)
_STEP = Family(
    r"model\.layers\.\d+\.moe",
    fused=FusedLayout(gate_up="gate_proj.weight", up="up_proj.weight", down="down_proj.weight"),
    individual=False,
    unbuilt=True,
)
_NEMOTRON = Family(
    r"backbone\.layers\.\d+\.mixer",
    projections=("up_proj", "down_proj"),
    fused=FusedLayout(gate_up="experts.up_proj"),
    drafts=r"mtp\.layers\.\d+\.mixer",
)
_NEMOTRON_OMNI = replace(_NEMOTRON, block=rf"language_model\.{_NEMOTRON.block}", drafts="", unbuilt=True, own_code=True)
_GEMMA4 = Family(r"model\.layers\.\d+", individual=False, prefixes=("model.language_model.",))

FAMILIES = {
    "mixtral": _W1_W3_W2,
    "qwen2_moe": _MLP,
    "qwen3_moe": _MLP,
    "qwen3_next": replace(_MLP, drafts=_MTP_MLP, plain_head=True),
    "qwen3_vl_moe": replace(_VISION, fused=FusedLayout(transposed=True), individual=False),
    "qwen3_5_moe": replace(_VISION, drafts=_MTP_MLP),
    "qwen3_5_moe_text": replace(_TEXT_OF_VISION, drafts=_MTP_MLP),
    "qwen3_omni_moe": Family(r"thinker\.model\.layers\.\d+\.mlp", unbuilt=True, plain_head=True),
    "olmoe": _MLP,
    "flex_olmo": _MLP,
    "deepseek_v2": _MLP,
    "deepseek_v3": _MLP_AND_DRAFTS,
    "deepseek_v32": _MLP_AND_DRAFTS,
    "deepseek_v4": Family(
        r"layers\.\d+\.ffn", projections=("w1", "w3", "w2"), drafts=r"mtp\.\d+\.ffn", unbuilt=True, plain_head=True
    ),
    "kimi_k2": replace(_MLP, built_as="deepseek_v3"),
    "kimi_linear": replace(_W1_W3_W2, dense="mlp"),
    "glm4_moe": _MLP_AND_DRAFTS,
    "glm4_moe_lite": _MLP_AND_DRAFTS,
    "glm_moe_dsa": _MLP_AND_DRAFTS,
    "gemma4": replace(_GEMMA4, block=r"model\.language_model\.layers\.\d+", prefixes=()),
    "gemma4_text": _GEMMA4,
    "phimoe": replace(_W1_W3_W2, plain_head=True),
    "minimax_m2": _W1_W3_W2,
    "minimax_m3_vl": replace(
        _W1_W3_W2,
        block=rf"language_model\.{_W1_W3_W2.block}",
        drafts=r"language_model\.model\.mtp\.layers\.\d+\.transformer_layer\.block_sparse_moe",
        unbuilt=True,
        plain_head=True,
    ),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "granitemoe_swa": replace(_GRANITE, fused=FusedLayout()),
    "lfm2_moe": replace(_FEED_FORWARD, projections=("w1", "w3", "w2")),
    "jamba": replace(_FEED_FORWARD, plain_head=True),
    "ernie4_5_moe": _MLP,
    "hunyuan_v1_moe": _MLP,
    "hy_v3": _MLP_AND_DRAFTS,
    "afmoe": replace(_MLP, plain_head=True),
    "exaone_moe": replace(_MLP, plain_head=True),
    "cohere2_moe": _MLP,
    "solar_open": _MLP,
    "mellum": _MLP,
    "dots1": _MLP,
    "mimo_v2_flash": _MLP,
    "laguna": replace(_MLP, kept=("experts.e_score_correction_bias",)),
    "axk1": _MLP,
    "dots3_note": replace(_MLP, unbuilt=True),
    "step3p5": _STEP,
    "step3p7": replace(_STEP, unbuilt=False, own_code=True),
    "deepseek": replace(_OWN_CODE, unnamed="self_attn"),
    "bailing_moe": _OWN_CODE,
    "bailing_moe_v2": _OWN_CODE,
    "bailing_hybrid": replace(_OWN_CODE, drafts=FOLLOWING),
    "mimo_v2": _OWN_CODE,
    "sarvam_moe": _OWN_CODE,
    "sarvam_mla": _OWN_CODE,
    "llama4": replace(_LLAMA4, block=rf"language_model\.{_LLAMA4.block}"),
    "llama4_text": _LLAMA4,
    "gpt_oss": replace(
        _MLP,
        fused=FusedLayout(transposed=True, interleaved=True),
        individual=False,
        kept=("experts.gate_up_proj_bias", "experts.down_proj_bias"),
        plain_head=True,
    ),
    "nemotron_h": _NEMOTRON,
    "nemotron_h_omni": _NEMOTRON_OMNI,
    "NemotronH_Nano_Omni_Reasoning_V3": _NEMOTRON_OMNI,
}


def has_own_code(config: Mapping[str, Any]) -> bool:
    """Whether a model can be loaded only with the code of its config that comes with it."""
    family = FAMILIES.get(str(config.get("model_type")))
    return family is None or family.own_code


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the code that it names, for a copy of the model.

    That code is not taken along, and with ``trust_remote_code`` it would be looked for. Only where nobody else has the
    config's class, its code stays named, and is taken along.
    """
    return _without_code(config, ("AutoConfig",) if has_own_code(config) else ())


def _without_code(config: Mapping[str, Any], kept: tuple[str, ...]) -> dict[str, Any]:
    code = config.get("auto_map")
    names = {key: code[key] for key in kept if key in code} if isinstance(code, Mapping) else {}
    plain = {
        key: _without_code(value, ()) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != "auto_map"
    }
    return {**plain, "auto_map": names} if names else plain


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: nested in a model that also sees, or also speaks."""
    for key in ("thinker_config", "text_config", "llm_config"):
        nested = config.get(key)
        config = nested if isinstance(nested, Mapping) else config
    return config


def with_plain_dtypes(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config for a copy of the model, with dtypes as transformers spells them, and without what no model computes in.

    It fails on others, and so does vLLM. Both take the dtype of the weights where there is none.

    >>> with_plain_dtypes({"torch_dtype": "torch.bfloat16", "text_config": {"dtype": "mixed"}})
    {'torch_dtype': 'bfloat16', 'text_config': {}}
    """
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value is not None:
            name = str(value).lower().removeprefix("torch.")
            if getattr(torch, name, None) in _FLOATS:
                plain[key] = name
        else:
            plain[key] = with_plain_dtypes(value) if isinstance(value, Mapping) else value
    return plain


def num_experts(config: Mapping[str, Any]) -> int:
    """The number of routed experts in each module. Raises ValueError unless the config says one."""
    config = text_config(config)
    numbers = {key: _one(config[key]) for key in _NUM_EXPERTS_KEYS if config.get(key) is not None}
    if not numbers:
        raise ValueError(f"config.json: expected {' or '.join(_NUM_EXPERTS_KEYS)}, got none")
    for key, number in numbers.items():
        if type(number) is not int or number < 1:
            raise ValueError(f"config.json: {key}: expected a number of experts from 1 up, got {number!r:.80}")
    if len(set(numbers.values())) > 1:
        raise ValueError(f"config.json: expected one number of experts, got {numbers}")
    return next(iter(numbers.values()))


def _one(number: Any) -> Any:
    """The one number that a list repeats for every layer, as HunYuan's do."""
    return number[0] if isinstance(number, list) and number and all(other == number[0] for other in number) else number


def experts_per_token(config: Mapping[str, Any]) -> int:
    """The number of routed experts that compute each token; if the config does not say it, a usual one.

    Raises ValueError for what is not a number of experts.
    """
    experts, config = num_experts(config), text_config(config)
    key = next((key for key in _EXPERTS_PER_TOKEN_KEYS if key in config), _EXPERTS_PER_TOKEN_KEYS[0])
    number = _one(config.get(key, min(2, experts)))
    if type(number) is not int or not 1 <= number <= experts:
        raise ValueError(f"config.json: {key}: expected a number of experts from 1 to {experts}, got {number!r:.80}")
    return number


def experts_size(config: Mapping[str, Any]) -> Any:
    """The number of features that experts take and give: those of the model, or fewer if it projects to these."""
    config = text_config(config)
    latent = config.get("moe_latent_size")
    return config.get("hidden_size") if latent is None else latent


def num_layers(config: Mapping[str, Any]) -> tuple[int, int]:
    """The number of decoder layers, and of the layers for multi-token prediction that may follow them.

    Raises ValueError unless the config says the former.
    """
    config = text_config(config)
    number = config.get("num_hidden_layers")
    if number is None and isinstance(kinds := config.get("layers_block_type"), list):
        # All that transformers writes of models whose layers differ in kind.
        number = len(kinds)
    if type(number) is not int or number < 1:
        raise ValueError(f"config.json: num_hidden_layers: expected a number of layers from 1 up, got {number!r:.80}")
    following = [config[key] for key in _MTP_LAYERS_KEYS if type(config.get(key)) is int]
    return number, max([0, *following])
