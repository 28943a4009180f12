"""What is known about each architecture with routed experts: to support another one, add a row to ``FAMILIES``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from offline.source.checkpoint import Checkpoint
from offline.source.fused import FusedLayout, FusedPart

_NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
_MTP_LAYERS_KEYS = ("num_nextn_predict_layers", "num_mtp_modules")


@dataclass(frozen=True)
class Family:
    """How an architecture names its routed experts.

    block: pattern of the MoE blocks, each with a module ``experts``; projections: gate, up and down, or up and down of
    experts without a gate, in this order, by the names that vLLM loads; fused: how the experts lie in a block with
    fused tensors; individual: whether transformers also reads one tensor per matrix; kept: tensors of a block's experts
    that are not quantized; decoder: what checkpoints call the module that transformers calls ``model``.
    """

    block: str
    projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    fused: FusedLayout = field(default_factory=FusedLayout)
    individual: bool = True
    kept: tuple[str, ...] = ()
    decoder: str = "model"

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

    def in_checkpoint(self, name: str) -> str:
        """What checkpoints call a tensor beside the experts that transformers calls ``name``."""
        return re.sub(r"^model\.", f"{self.decoder}.", name)

    def part(self, module: str, projection: str) -> FusedPart:
        """Where a projection of a module's experts lies in a block with fused tensors."""
        place = self.projections.index(projection)
        is_down = projection == self.down
        half = place if self.gated and not is_down else None
        return FusedPart(_below_block(module, self.fused.down if is_down else self.fused.gate_up), self.fused, half)

    def native_part(self, module: str, projection: str) -> FusedPart | None:
        """The same if fused tensors are all that transformers reads of this family, else None."""
        return None if self.individual else self.part(module, projection)

    def kept_tensors(self, module: str) -> set[str]:
        """The tensors beside a module's experts that are not quantized."""
        return {_below_block(module, name) for name in self.kept}


def _below_block(module: str, name: str) -> str:
    return module.removesuffix("experts") + name


_MLP = Family(r"model\.layers\.\d+\.mlp")
_W1_W3_W2 = Family(r"model\.layers\.\d+\.block_sparse_moe", projections=("w1", "w3", "w2"))
_GRANITE = Family(
    r"model\.layers\.\d+\.block_sparse_moe",
    fused=FusedLayout(gate_up="input_linear.weight", down="output_linear.weight"),
    individual=False,
)
_LLAMA4 = Family(r"model\.layers\.\d+\.feed_forward", fused=FusedLayout(transposed=True), individual=False)

FAMILIES = {
    "mixtral": _W1_W3_W2,
    "qwen2_moe": _MLP,
    "qwen3_moe": _MLP,
    "qwen3_next": _MLP,
    "qwen3_5_moe": replace(_MLP, block=r"model\.language_model\.layers\.\d+\.mlp"),
    "qwen3_5_moe_text": _MLP,
    "olmoe": _MLP,
    "deepseek_v2": _MLP,
    "deepseek_v3": _MLP,
    "glm4_moe": _MLP,
    "phimoe": _W1_W3_W2,
    "minimax_m2": _W1_W3_W2,
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "llama4": replace(_LLAMA4, block=rf"language_model\.{_LLAMA4.block}"),
    "llama4_text": _LLAMA4,
    "gpt_oss": replace(
        _MLP,
        fused=FusedLayout(transposed=True, interleaved=True),
        individual=False,
        kept=("experts.gate_up_proj_bias", "experts.down_proj_bias"),
    ),
    "nemotron_h": Family(
        r"backbone\.layers\.\d+\.mixer",
        projections=("up_proj", "down_proj"),
        fused=FusedLayout(gate_up="experts.up_proj"),
        decoder="backbone",
    ),
}


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint. Raises ValueError for a dense model and for an unknown architecture."""
    model_type = checkpoint.config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if isinstance(model_type, str) and not any(".experts." in name for name in checkpoint.tensors):
        raise ValueError(
            f"{checkpoint.path}: model_type {model_type!r} is a dense model, without routed experts: "
            "expected a Mixture-of-Experts model"
        )
    raise ValueError(f"{checkpoint.path}: model_type: expected one of {', '.join(FAMILIES)}, got {model_type!r:.80}")


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the code that it names, for a copy of the model.

    transformers has every family of the table itself. That code is not taken along, and with ``trust_remote_code`` it
    would be looked for.
    """
    return {
        key: without_code(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != "auto_map"
    }


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: nested in a model that also sees."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def with_plain_dtypes(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config for a copy of the model, with dtypes as transformers spells them, and without those that are none.

    It fails on others, and so does vLLM. Both take the dtype of the weights where there is none.

    >>> with_plain_dtypes({"torch_dtype": "torch.bfloat16", "text_config": {"dtype": "mixed"}})
    {'torch_dtype': 'bfloat16', 'text_config': {}}
    """
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value is not None:
            name = str(value).lower().removeprefix("torch.")
            if isinstance(getattr(torch, name, None), torch.dtype):
                plain[key] = name
        else:
            plain[key] = with_plain_dtypes(value) if isinstance(value, Mapping) else value
    return plain


def num_experts(config: Mapping[str, Any]) -> int:
    """The number of routed experts in each module. Raises ValueError unless the config says one."""
    config = text_config(config)
    numbers = {key: config[key] for key in _NUM_EXPERTS_KEYS if config.get(key) is not None}
    if not numbers:
        raise ValueError(f"config.json: expected {' or '.join(_NUM_EXPERTS_KEYS)}, got none")
    for key, number in numbers.items():
        if type(number) is not int or number < 1:
            raise ValueError(f"config.json: {key}: expected a number of experts from 1 up, got {number!r:.80}")
    if len(set(numbers.values())) > 1:
        raise ValueError(f"config.json: expected one number of experts, got {numbers}")
    return next(iter(numbers.values()))


def experts_per_token(config: Mapping[str, Any]) -> int:
    """The number of routed experts that compute each token; if the config does not say it, a usual one.

    Raises ValueError for what is not a number of experts.
    """
    experts = num_experts(config)
    number = text_config(config).get("num_experts_per_tok", min(2, experts))
    if type(number) is not int or not 1 <= number <= experts:
        raise ValueError(
            f"config.json: num_experts_per_tok: expected a number of experts from 1 to {experts}, got {number!r:.80}"
        )
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


def is_draft(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor belongs to a layer for multi-token prediction, which only drafts."""
    layers = family_of(checkpoint).block.partition(r"\d+")[0].replace("\\", "")
    number = name.removeprefix(layers).partition(".")[0]
    decoder, following = num_layers(checkpoint.config)
    follows = name.startswith(layers) and number.isdecimal() and decoder <= int(number) < decoder + following
    return name.startswith("mtp.") or follows
