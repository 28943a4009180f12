"""A model as transformers builds it, without weights: what it computes, and what a checkpoint of it must hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offline.source.architectures import Family, family_of, num_layers
from offline.source.checkpoint import Checkpoint
from offline.source.fused import FusedPart

# What checkpoints call the router's weight where transformers calls it ``router.weight``.
ROUTERS = {
    **dict.fromkeys(("granitemoe", "granitemoeshared"), "router.layer.weight"),
    "phimoe": "gate.weight",
}
# What a config keeps of the program that saved it: no tensor depends on it, nor does vLLM.
_LEFTOVERS = {
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "attn_implementation",
    "_experts_implementation", "experts_implementation", "auto_map", "dtype", "torch_dtype", "quantization_config",
    "return_dict",
}  # fmt: skip


@dataclass(frozen=True)
class Needs:
    """What a checkpoint of a model must hold.

    tensors: the shape of each tensor beside the experts, by its names, of which one will do where the model ties
    several; modules: of experts, each with the shape of an expert's first matrix (gate, or up without one).
    """

    tensors: Mapping[tuple[str, ...], tuple[int, ...]]
    modules: Mapping[str, tuple[int, int]]


def skeleton(source: Checkpoint) -> Any:
    """The model on the meta device, in float32.

    Raises ValueError for a config that transformers cannot build a model from.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    model_type = str(source.config.get("model_type"))
    sees = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    auto: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with by_transformers(source, "build"), torch.device("meta"):
        config = CONFIG_MAPPING[model_type].from_dict(_without_leftovers(source.config))
        return auto.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()


@contextmanager
def by_transformers(source: Checkpoint, what: str) -> Iterator[None]:
    """Raise ValueError for whatever transformers fails with, because a config of wrong types fails anywhere in it.

    what: it does with the model.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{source.path}: config.json: expected a config with which transformers can {what} the model, "
            f"got {reason:.200}: correct it or download it again"
        ) from error


def needs(checkpoint: Checkpoint) -> Needs | None:
    """What a checkpoint must hold by its config; None if transformers does not know the type of model.

    Raises ValueError as ``skeleton`` does, and for more layers than there can be.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if checkpoint.config.get("model_type") not in CONFIG_MAPPING:
        return None
    layers, _ = num_layers(checkpoint.config)
    # Building them would take for ever.
    if layers > len(checkpoint.tensors):
        raise ValueError(
            f"{checkpoint.path}: config.json: num_hidden_layers: expected at most one layer for each of "
            f"{len(checkpoint.tensors)} tensors, got {layers}: correct it or download it again"
        )
    model, family = skeleton(checkpoint), family_of(checkpoint)
    blocks = _blocks(model, family)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    router = ROUTERS.get(str(checkpoint.config["model_type"]), "router.weight")
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    modules = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        block = next((block for block in blocks if key.startswith(block)), "")
        below = key.removeprefix(block)
        name = blocks[block] + (router if below == "router.weight" else below) if block else family.in_checkpoint(key)
        module = f"{blocks[block]}experts" if block and below.startswith("experts.") else None
        if module and name not in family.kept_tensors(module):
            if below == ("experts.gate_up_proj" if family.gated else "experts.up_proj"):
                part = FusedPart(name, family.fused, 0 if family.gated else None)
                modules[module] = part.matrix_shape(tuple(tensor.shape))
        elif not any(pattern.search(key) for pattern in ignored):
            # Names of one tensor have one object.
            names.setdefault(id(tensor), []).append(name)
            tensors[id(tensor)] = tensor
    return Needs({tuple(names[i]): tuple(tensor.shape) for i, tensor in tensors.items()}, modules)


def _blocks(model: nn.Module, family: Family) -> dict[str, str]:
    """The names of the MoE blocks in transformers, with a dot, and those in checkpoints."""
    blocks = {}
    for name, module in model.named_modules():
        if name.endswith(".experts") and next(module.parameters(), None) is not None:
            layer = re.findall(r"\d+", name)[-1]
            blocks[name.removesuffix("experts")] = family.block.replace(r"\d+", layer).replace("\\", "") + "."
    return blocks


def _without_leftovers(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: _read(value) for key, value in config.items() if key not in _LEFTOVERS}
    # Where it is null, vLLM computes it, and some of transformers' models do so only where it is absent.
    if "head_dim" in kept and kept["head_dim"] is None:
        del kept["head_dim"]
    padding, vocab_size = config.get("pad_token_id"), config.get("vocab_size")
    # transformers makes a row of zeros of it, which a checkpoint replaces.
    if type(padding) is int and type(vocab_size) is int and not -vocab_size <= padding < vocab_size:
        kept["pad_token_id"] = None
    return kept


def _read(value: Any) -> Any:
    """A value of a config; JSON has no infinity, for which transformers writes an object."""
    if isinstance(value, list):
        return [_read(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    return float(value["__float__"]) if value.keys() == {"__float__"} else _without_leftovers(value)
