"""Which models can be run layer by layer, as transformers' own code shows: no family is named here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offline.model.formula import is_known, takes_sorted
from offline.model.skeleton import built_type, skeleton, stored_rows, tensors_beside_experts
from offline.source.architectures import experts_per_token
from offline.source.checkpoint import Checkpoint
from offline.source.recognition import family_of

# What Nemotron projects the sum of its experts' outputs by; an identity where they do not compute on latents.
_LATENT_PROJECTION = "fc2_latent_proj"


def can_run(source: Checkpoint) -> bool:
    """Whether ``Decoder`` can run the model. Raises ValueError for a config that transformers cannot use."""
    return not why_not(source)


def why_not(source: Checkpoint) -> str:
    """Why ``Decoder`` cannot run a model, or nothing. Raises as ``can_run``."""
    if built_type(source) is None:
        return "transformers does not build the type of model from tensors of these names"
    model = skeleton(source)
    decoder = text_decoder(model)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or model.get_output_embeddings() is None or last_norm(decoder)[0] == "":
        return "its decoder is not a list of layers, a norm and a head"
    modules = [module for layer in layers if (module := experts_module(layer)) is not None]
    if not modules or not all(map(is_known, modules)):
        return "its experts compute something else than down(act(gate(x)) * up(x)) or down(act(up(x)))"
    if any(map(takes_sorted, modules)) and experts_per_token(source.config) > 1:
        return "its router scales the inputs of several experts for each token"
    names = {module: name for name, module in model.named_modules()}
    prefix = f"{names[decoder]}." if names[decoder] else ""
    needed = {f"{prefix}{key}": tensor for key, tensor in tensors_beside_experts(decoder).items()}
    if needed.keys() != stored_rows(model, family_of(source), needed).keys():
        return "its layers are stored otherwise than they are computed"
    if _has_nan(computed_buffers(decoder)):
        if _has_nan(computed_buffers(decoder, unknown=0.0)):
            raise ValueError(
                f"{source.path}: config.json: expected numbers that transformers can compute positions with, "
                "got some that give NaN: correct it or download it again"
            )
        return "it has tensors that neither its files nor transformers fill"
    return ""


def text_decoder(model: Any) -> Any:
    """The decoder of a model: the module with layers, which Llama-4 gives together with its head."""
    decoder = model.get_decoder()
    return next((part for part in decoder.modules() if hasattr(part, "layers")), decoder)


def experts_module(layer: nn.Module) -> nn.Module | None:
    """The module of routed experts in a decoder layer, if it has one."""
    named = (module for name, module in layer.named_modules() if name.split(".")[-1] == "experts")
    return next((module for module in named if next(module.parameters(), None) is not None), None)


def latent_projection(layer: nn.Module) -> nn.Linear | None:
    """What brings the sum of the experts' outputs back from latents to the layer's features, if anything does."""
    named = (module for name, module in layer.named_modules() if name.split(".")[-1] == _LATENT_PROJECTION)
    return next((module for module in named if isinstance(module, nn.Linear)), None)


def last_norm(decoder: nn.Module) -> tuple[str, nn.Module]:
    """The norm after the last layer and its name, which is empty if there is none."""
    norms = [(name, module) for name, module in decoder.named_children() if type(module).__name__.endswith("Norm")]
    return norms[-1] if norms else ("", decoder)


def computed_buffers(decoder: Any, unknown: float = math.nan) -> dict[str, Tensor]:
    """What no checkpoint has of a decoder, as transformers computes it, by name; it is put in its place.

    What transformers does not compute stays ``unknown``.
    """
    buffers: dict[str, Tensor] = {}
    for name, module in decoder.named_modules():
        own = [key for key in module._non_persistent_buffers_set if module._buffers[key] is not None]
        for key in own:
            buffer = module._buffers[key]
            value = unknown if buffer.is_floating_point() else 0
            module._buffers[key] = torch.full(buffer.shape, value, dtype=buffer.dtype, device="cpu")
        if own:
            with torch.no_grad():
                decoder._init_weights(module)
        buffers |= {f"{name}.{key}".removeprefix("."): module._buffers[key] for key in own}
    return buffers


def _has_nan(buffers: Mapping[str, Tensor]) -> bool:
    return any(bool(buffer.isnan().any()) for buffer in buffers.values() if buffer.is_floating_point())


def place_buffers(module: nn.Module, buffers: Mapping[str, Tensor], device: torch.device) -> None:
    """Put buffers into a module, by name, on a device."""
    for name, buffer in buffers.items():
        parent, _, leaf = name.rpartition(".")
        module.get_submodule(parent)._buffers[leaf] = buffer.to(device)
