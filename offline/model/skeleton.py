"""A model as transformers builds it, without weights: what it computes, and what a checkpoint of it must hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from offline.source.architectures import FAMILIES, Family, num_layers
from offline.source.checkpoint import Checkpoint
from offline.source.fused import FusedPart
from offline.source.recognition import family_of

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
    several; modules: of experts, each with the shape of an expert's gate.
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

    model_type = built_type(source)
    sees = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    auto: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with by_transformers(source, "build"), torch.device("meta"):
        config = CONFIG_MAPPING[str(model_type)].from_dict(
            {**_without_leftovers(source.config), "model_type": model_type}
        )
        return auto.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()


def built_type(checkpoint: Checkpoint) -> str | None:
    """The type of model that transformers builds for a checkpoint; None if it is not known to build what is stored.

    A type that is not in the table of families may be stored under names that transformers would not give its tensors.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = checkpoint.config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    built_as = (family.built_as or str(model_type)) if family else None
    return built_as if built_as in CONFIG_MAPPING else None


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
    if built_type(checkpoint) is None:
        return None
    layers, _ = num_layers(checkpoint.config)
    # Building them would take for ever.
    if layers > len(checkpoint.tensors):
        raise ValueError(
            f"{checkpoint.path}: config.json: num_hidden_layers: expected at most one layer for each of "
            f"{len(checkpoint.tensors)} tensors, got {layers}: correct it or download it again"
        )
    model, family = skeleton(checkpoint), family_of(checkpoint)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    tensors: dict[str, Tensor] = {}
    modules = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        module, experts, name = key.rpartition(".experts.")
        if experts and name in ("gate_up_proj", "down_proj"):
            if name == "gate_up_proj":
                layer = re.findall(r"\d+", module)[-1]
                modules[f"{family.block_of(layer)}.experts"] = _gate_shape(family, model, tuple(tensor.shape))
        elif not any(pattern.search(key) for pattern in ignored):
            tensors[key] = tensor
    # Names of one tensor have one object.
    first = {id(tensor): key for key, tensor in reversed(tensors.items())}
    stored = stored_names(model, family, {key: tensors[key] for key in tensors if first[id(tensors[key])] == key})
    names = {id(tensor): [name] for name, tensor in stored.items()}
    for key, tensor in tensors.items():
        if first[id(tensor)] != key:
            names[id(tensor)] += stored_names(model, family, {key: tensor})
    return Needs({tuple(alike): tuple(stored[alike[0]].shape) for alike in names.values()}, modules)


def stored_names(model: Any, family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model by the names that they have in a checkpoint of the family, as transformers would save them.

    tensors: by their names in the model, without those of experts.
    """
    from transformers.core_model_loading import revert_weight_conversion

    own = FAMILIES[model.config.model_type].prefix if model.config.model_type in FAMILIES else family.prefix
    saved = revert_weight_conversion(model, dict(tensors))
    return {
        family.prefix + name.removeprefix(own) if name.startswith(own) else name: tensor
        for name, tensor in saved.items()
    }


def _gate_shape(family: Family, model: Any, gate_up: tuple[int, ...]) -> tuple[int, int]:
    """The shape of an expert's gate by that of the model's parameter for gate and up, in either orientation."""
    hidden_size = model.config.get_text_config().hidden_size
    transposed = gate_up[1] == hidden_size if gate_up[2] != hidden_size else family.fused.transposed
    return FusedPart("", replace(family.fused, transposed=transposed), 0).matrix_shape(gate_up)


def _without_leftovers(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: _decoded(value) for key, value in config.items() if key not in _LEFTOVERS}
    # Where it is null, vLLM computes it, and some of transformers' models do so only where it is absent.
    if "head_dim" in kept and kept["head_dim"] is None:
        del kept["head_dim"]
    padding, vocab_size = config.get("pad_token_id"), config.get("vocab_size")
    # transformers makes a row of zeros of it, which a checkpoint replaces.
    if type(padding) is int and type(vocab_size) is int and not -vocab_size <= padding < vocab_size:
        kept["pad_token_id"] = None
    return kept


def _decoded(value: Any) -> Any:
    """A value of a config, with the numbers that transformers writes as objects because JSON does not have them.

    >>> _decoded([0.0, {"__float__": "Infinity"}])
    [0.0, inf]
    """
    if isinstance(value, list):
        return [_decoded(part) for part in value]
    if not isinstance(value, Mapping):
        return value
    return float(value["__float__"]) if value.keys() == {"__float__"} else _without_leftovers(value)
