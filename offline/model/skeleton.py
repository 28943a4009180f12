"""A model as transformers builds it, without weights: what it computes, and what a checkpoint of it must hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from offline.messages import reason
from offline.source.architectures import FAMILIES, Family, experts_size, num_layers
from offline.source.checkpoint import Checkpoint
from offline.source.fused import FusedPart
from offline.source.recognition import family_of

_MATRICES = re.compile(r"\.experts\.(?:gate_up|up|down)_proj$")
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
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    model_type = built_type(source)
    sees = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    auto: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with by_transformers(source, "build"), torch.device("meta"):
        config = _config_class(str(model_type)).from_dict(
            {**_without_leftovers(source.config), "model_type": model_type}
        )
        return auto.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()


def built_type(checkpoint: Checkpoint) -> str | None:
    """The type of model that transformers builds for a checkpoint; None if it is not known to build what is stored.

    A type that is not in the table of families may be stored under names that transformers would not give its tensors.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = checkpoint.config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    built_as = (family.built_as or str(model_type)) if family and not family.unbuilt else None
    return built_as if built_as in CONFIG_MAPPING_NAMES else None


def _config_class(model_type: str) -> Any:
    """transformers' own class, also in a process of vLLM's, which puts others in the place of some."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return getattr(transformers, CONFIG_MAPPING_NAMES[model_type])


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
        raise ValueError(
            f"{source.path}: config.json: expected a config with which transformers can {what} the model, "
            f"got {type(error).__name__}: {reason(error):.200}: correct it or download it again"
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
    tensors = {
        key: tensor
        for key, tensor in tensors_beside_experts(model).items()
        if not any(pattern.search(key) for pattern in ignored)
    }
    modules = {
        f"{family.block_of(layer_number(key))}.experts": _first_shape(family, model, tuple(tensor.shape))
        for key, tensor in model.state_dict(keep_vars=True).items()
        if key.endswith(".experts.gate_up_proj" if family.gated else ".experts.up_proj")
    }
    names, converted = stored_names(model, family, tensors)
    alike: dict[int, list[str]] = {}
    for key, tensor in tensors.items():
        if key in names:
            # Names of one tensor have one object.
            alike.setdefault(id(tensor), []).append(key)
    needed = {tuple(names[key] for key in keys): tuple(tensors[keys[0]].shape) for keys in alike.values()}
    return Needs(needed | {(name,): tuple(tensor.shape) for name, tensor in converted.items()}, modules)


def stored_names(model: Any, family: Family, tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What tensors of a model are called in a checkpoint of the family, as transformers would save them.

    tensors: by their names in the model, without those of experts.
    Returns the names of those that are stored as they are, by their names in the model; and what is stored in place of
    the others, by name.
    """
    from transformers.core_model_loading import revert_weight_conversion

    named = _naming(model, family)
    # Names of one tensor have one object, and cannot be told apart once they are renamed.
    first = {id(tensor): key for key, tensor in reversed(list(tensors.items()))}
    saved = revert_weight_conversion(model, {key: tensors[key] for key in first.values()})
    names = {first[id(tensor)]: named(name) for name, tensor in saved.items() if id(tensor) in first}
    for key, tensor in tensors.items():
        if first[id(tensor)] != key:
            names[key] = named(next(iter(revert_weight_conversion(model, {key: tensor}))))
    return names, {named(name): tensor for name, tensor in saved.items() if id(tensor) not in first}


def stored_rows(model: Any, family: Family, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """What holds each tensor of a model in a checkpoint of the family, by its name in the model: the tensor itself, or
    several whose rows follow on each other. Those that are stored otherwise are left out.

    tensors: as of ``stored_names``.
    """
    from transformers.core_model_loading import revert_weight_conversion

    names, _ = stored_names(model, family, tensors)
    found: dict[str, tuple[str, ...]] = {key: (name,) for key, name in names.items()}
    named = _naming(model, family)
    for key, tensor in tensors.items():
        if key in names or not tensor.dim():
            continue
        # Numbered rows show what becomes of them.
        rows = torch.arange(len(tensor)).view(-1, *[1] * (tensor.dim() - 1)).expand(tensor.shape)
        parts = revert_weight_conversion(model, {key: rows})
        alike = all(part.shape[1:] == rows.shape[1:] for part in parts.values())
        if alike and torch.equal(torch.cat(list(parts.values())), rows):
            found[key] = tuple(map(named, parts))
    return found


def _naming(model: Any, family: Family) -> Callable[[str], str]:
    """From names that transformers would give the tensors of a model to those of the family."""
    own = FAMILIES[model.config.model_type].prefix if model.config.model_type in FAMILIES else family.prefix
    routed = {layer_number(key) for key in model.state_dict() if _MATRICES.search(key)}

    def named(name: str) -> str:
        below = name.removeprefix(own)
        name = name if below == name else family.prefix + below
        block = re.match(rf"{family.block}(?=\.)", name)
        if not (family.dense and block) or layer_number(name) in routed:
            return name
        return f"{block[0].rpartition('.')[0]}.{family.dense}{name[block.end() :]}"

    return named


def tensors_beside_experts(model: Any) -> dict[str, Tensor]:
    """The parameters and buffers of a model but for the matrices of its experts, by their names in it."""
    return {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if not _MATRICES.search(key)}


def layer_number(name: str) -> int:
    """The number of the decoder layer that a module or a tensor is in: the first that its name has after ``layers``.

    >>> layer_number("model.layers.3.mlp.experts.7")
    3
    """
    return int(name.rpartition("layers.")[2].partition(".")[0])


def _first_shape(family: Family, model: Any, fused: tuple[int, ...]) -> tuple[int, int]:
    """The shape of an expert's gate, or up without one, by that of the model's parameter that holds it, in either
    orientation.
    """
    size = experts_size(model.config.get_text_config().to_dict())
    transposed = fused[1] == size if fused[1] != fused[2] else family.fused.transposed
    half = 0 if family.gated else None
    return FusedPart("", replace(family.fused, transposed=transposed), half).matrix_shape(fused)


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
