"""Which family a checkpoint is of: by the type of model that its config names, or else by the names of its experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from typing import Any, NoReturn

from offline.source.architectures import FAMILIES, Family, num_layers, text_config
from offline.source.checkpoint import Checkpoint
from offline.source.unsupported import REASONS

# What the names of a decoder's layers begin with, in the models that vLLM and transformers load.
_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "backbone.", "language_model.backbone.")
# What tools put in front of all names, which neither of the two loads.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "base_model.model.": "PEFT",
    "module.": "a wrapper for training on several devices",
}
_EXPERT_WORDS = re.compile(r"expert|\bmoe\b|_moe\b|\bmoe_", re.IGNORECASE)


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint, with the pattern that its names have.

    Raises ValueError for a dense model, for an unknown architecture whose experts are named as no known one's are, and
    for names that vLLM would not load.
    """
    return FAMILIES[known_type(checkpoint)].under(_prefix(checkpoint))


def known_type(checkpoint: Checkpoint) -> str:
    """The type of model in the table of families whose experts a checkpoint's are named like.

    That is its own type, or the one that the user names, or the first of which the names are alike. Raises ValueError
    as ``family_of`` does.
    """
    model_type = checkpoint.config.get("model_type")
    if checkpoint.family is not None:
        if checkpoint.family not in FAMILIES:
            raise ValueError(f"`family`: expected one of {', '.join(FAMILIES)}, got {checkpoint.family!r:.80}")
        return checkpoint.family
    if isinstance(model_type, str) and model_type in FAMILIES:
        return model_type
    _refuse_wrapped(checkpoint)
    alike = (
        name
        for name, family in FAMILIES.items()
        if not family.own_code and _prefixes_of(checkpoint.tensors, family) & {*_PREFIXES, family.prefix}
    )
    found = next(alike, None) if isinstance(model_type, str) and model_type not in REASONS else None
    if found is None:
        _refuse_unknown(checkpoint, model_type)
    return found


def taken_for(checkpoint: Checkpoint) -> str:
    """What a user should know of how the family was found, or nothing where the type of model is in the table."""
    model_type, name = checkpoint.config.get("model_type"), known_type(checkpoint)
    if model_type == name:
        return ""
    how = "as `family` says" if checkpoint.family else "by the names of its experts"
    return f"model_type {model_type!r} is not in the table of families: read like {name}, {how}"


def draft_tensors(checkpoint: Checkpoint) -> set[str]:
    """The names of tensors of layers for multi-token prediction, which only draft."""
    prefix, (decoder, following) = _prefix(checkpoint), num_layers(checkpoint.config)
    layer = re.compile(rf"{re.escape(prefix)}layers\.(\d+)\.")
    return {
        name
        for name in checkpoint.tensors
        # ERNIE's are parts of `mtp_block`, `mtp_linear_proj` and others.
        if name.startswith(("mtp.", f"{prefix}mtp.", f"{prefix}mtp_"))
        or ((match := layer.match(name)) and decoder <= int(match[1]) < decoder + following)
    }


def _prefix(checkpoint: Checkpoint) -> str:
    """What the names of a checkpoint's layers begin with; the family's own prefix where no experts are found.

    Raises ValueError for a prefix under which vLLM does not look for the family.
    """
    name = known_type(checkpoint)
    family = FAMILIES[name]
    of_its_own = checkpoint.config.get("model_type") == name
    known = (family.prefix, *(family.prefixes if of_its_own else _PREFIXES))
    found = _prefixes_of(checkpoint.tensors, family)
    if usable := [prefix for prefix in known if prefix in found]:
        return usable[0]
    _refuse_wrapped(checkpoint)
    if found:
        raise ValueError(
            f"{checkpoint.path}: expected names of layers that begin with {' or '.join(known)}layers., as vLLM loads "
            f"{name}, got {min(found)}layers.: load the model in transformers, save it and convert that"
        )
    return family.prefix


def _refuse_wrapped(checkpoint: Checkpoint) -> None:
    for wrapper, tool in _WRAPPERS.items():
        if any(name.startswith(wrapper) for name in checkpoint.tensors):
            raise ValueError(
                f"{checkpoint.path}: expected the names of the model's own tensors, got names that begin with "
                f"{wrapper}, which {tool} puts there: save the model that is wrapped and convert that"
            )


def _prefixes_of(names: Iterable[str], family: Family) -> set[str]:
    """What names of layers begin with where there are experts as a family names them."""
    projections = "|".join(family.projections)
    experts = [re.escape(name) for name in family.fused.tensors]
    if family.individual or family.fused.tensors[0].startswith("experts."):
        experts.append(rf"experts\.\d+\.(?:{projections})\.weight")
    # What a conversion stores has the names of single matrices, whatever the family.
    experts.append(rf"experts\.\d+\.(?:{projections})\.weight_packed")
    pattern = re.compile(rf"(.*?)layers\.\d+{family.below_layer}\.(?:{'|'.join(experts)})")
    return {match[1] for name in names if (match := pattern.fullmatch(name))}


def _refuse_unknown(checkpoint: Checkpoint, model_type: object) -> NoReturn:
    """Raise ValueError for a model that is dense, or of a type that is not known or not supported."""
    if isinstance(model_type, str) and model_type in REASONS:
        raise ValueError(f"{checkpoint.path}: model_type {model_type!r} is not supported: {REASONS[model_type]}")
    experts = sorted(name for name in checkpoint.tensors if _EXPERT_WORDS.search(name))
    if isinstance(model_type, str) and not experts and not _counts_experts(checkpoint.config):
        raise ValueError(
            f"{checkpoint.path}: model_type {model_type!r} is a dense model, without routed experts: "
            "expected a Mixture-of-Experts model"
        )
    nearest = max(FAMILIES, key=lambda name: _likeness(name, model_type, experts))
    named = f", whose experts are named like {experts[0]}" if experts else ""
    raise ValueError(
        f"{checkpoint.path}: model_type: expected one of {', '.join(FAMILIES)}, got {model_type!r:.80}, an unknown "
        f"Mixture-of-Experts model{named}: the nearest family is {nearest}, with {FAMILIES[nearest].example}; name one "
        "with `family` if the names agree, or add a row as docs/development.md says"
    )


def _counts_experts(config: Mapping[str, Any]) -> bool:
    """Whether a config says that there are several of some kind of expert."""
    counts = ((key, value) for part in (config, text_config(config)) for key, value in part.items())
    return any("expert" in key and type(value) is int and value > 1 for key, value in counts)


def _likeness(name: str, model_type: object, experts: list[str]) -> tuple[float, float]:
    example = FAMILIES[name].example
    by_experts = max((SequenceMatcher(None, example, expert).ratio() for expert in experts[:3]), default=0.0)
    return by_experts, SequenceMatcher(None, name, str(model_type)).ratio()
