"""Whether a finished AlphaQ checkpoint is whole, and true to its source."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from alphaq_vllm.checksums import check_sums
from alphaq_vllm.format import AlphaQSpec, TensorSpec, matrix_tensors
from offline.model.check import Found, check_tensors, first_damaged
from offline.operations.compare import compare
from offline.source.alphaq import check_alphaq
from offline.source.checkpoint import Checkpoint, open_checkpoint
from offline.source.families import ExpertMatrix, find_experts
from offline.source.linear import stored_linear_layers
from offline.source.recognition import draft_tensors, family_of


def validate(model: str | Path, source: str | Path | None = None, *, revision: str | None = None) -> dict[str, Any]:
    """Check a checkpoint completely: sums, names, shapes, dtypes, finite values, and what they were converted from.

    Args:
        model: An AlphaQ checkpoint: a directory, or a name on the Hugging Face Hub.
        source: What it was converted from, to compare with, or None.
        revision: The branch, tag or commit of a source on the Hub, by default the main branch.

    Returns:
        What was checked; ``errors`` has the quantization error of each width, if there is a source.

    Raises:
        ValueError: Naming the file or tensor, for anything that is wrong.
        OSError: For files that are missing or cannot be read.
    """
    if revision is not None and source is None:
        raise ValueError(f"`revision`: expected it with `source`, whose it is, got {revision!r:.80} alone")
    checkpoint = open_checkpoint(str(model))
    files = check_sums(checkpoint.path)
    widths = check_alphaq(checkpoint)
    found = _check_complete(checkpoint, widths)
    # Those of quantized linear layers have other names.
    if damaged := first_damaged(checkpoint, [name for name in found.needed if name in checkpoint.tensors]):
        raise ValueError(
            f"{damaged}: expected finite values, got NaN, infinity or what makes float32 overflow: "
            "convert the source again"
        )
    errors = compare(checkpoint, widths, open_checkpoint(str(source), revision, checkpoint.family)) if source else {}
    return {
        "checkpoint": str(checkpoint.path),
        "source": str(source) if source else None,
        "files": files,
        "found": str(found),
        "tensors": len(checkpoint.tensors),
        "matrices": len(widths),
        "linear_layers": len(AlphaQSpec.from_dict(checkpoint.config["quantization_config"]).linear),
        "errors": {num_bits: asdict(error) for num_bits, error in errors.items()},
    }


def _check_complete(checkpoint: Checkpoint, widths: Mapping[ExpertMatrix, int]) -> Found:
    """Check that nothing is missing that the model needs; widths: of the quantized matrices, which are complete."""
    spec = AlphaQSpec.from_dict(checkpoint.config["quantization_config"])
    linear = stored_linear_layers(checkpoint, spec.linear)
    stored = {
        f"{matrix.name}.{suffix}"
        for matrix, num_bits in widths.items()
        for suffix in matrix_tensors(*matrix.shape, num_bits, spec.group_size)
    }
    stored |= {name for layer, linear_format in linear.items() for name in layer.specs(linear_format)}
    specs = {name: checkpoint.spec(name) for name in checkpoint.tensors}
    # Quantized layers stand for the source's tensors.
    specs |= {layer.tensor: TensorSpec(layer.shape, torch.bfloat16) for layer in linear}
    matrices = [*widths, *_excluded(checkpoint, spec)]
    first = {matrix.module: matrix.shape for matrix in reversed(matrices)}
    return check_tensors(checkpoint, specs, first, stored | {matrix.tensor for matrix in matrices})


def _excluded(checkpoint: Checkpoint, spec: AlphaQSpec) -> tuple[ExpertMatrix, ...]:
    """The matrices of modules of experts that are stored as in the source, checked to be complete."""
    modules, drafts = tuple(f"{module}." for module in spec.num_bits), draft_tensors(checkpoint)
    kept = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not name.startswith(modules) and name not in drafts
    }
    family = family_of(checkpoint)
    pattern = re.compile(rf"{family.block}\.(experts\.|{re.escape(family.fused.gate_up)})")
    if not any(map(pattern.match, kept)):
        return ()
    plain = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return find_experts(replace(checkpoint, config=plain, tensors=kept, quantization=None)).matrices
