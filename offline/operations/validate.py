"""Whether a finished AlphaQ checkpoint is whole, and true to its source."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from alphaq_vllm.checksums import check_sums
from alphaq_vllm.format import AlphaQSpec
from offline.operations.compare import compare
from offline.source.alphaq import check_alphaq
from offline.source.checkpoint import open_checkpoint


def validate(model: str | Path, source: str | Path | None = None) -> dict[str, Any]:
    """Check a checkpoint completely: sums, names, shapes, dtypes, finite values, and what they were converted from.

    Args:
        model: An AlphaQ checkpoint: a directory, or a name on the Hugging Face Hub.
        source: What it was converted from, to compare with, or None.

    Returns:
        What was checked; ``errors`` has the quantization error of each width, if there is a source.

    Raises:
        ValueError: Naming the file or tensor, for anything that is wrong.
        OSError: For files that are missing or cannot be read.
    """
    checkpoint = open_checkpoint(str(model))
    files = check_sums(checkpoint.path)
    widths = check_alphaq(checkpoint)
    for name, stored in checkpoint.tensors.items():
        if stored.spec.dtype.is_floating_point and not _is_finite(checkpoint.load(name)):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity: convert the source again")
    errors = compare(checkpoint, widths, open_checkpoint(str(source))) if source else {}
    return {
        "checkpoint": str(checkpoint.path),
        "source": str(source) if source else None,
        "files": files,
        "tensors": len(checkpoint.tensors),
        "matrices": len(widths),
        "linear_layers": len(AlphaQSpec.from_dict(checkpoint.config["quantization_config"]).linear),
        "errors": {num_bits: asdict(error) for num_bits, error in errors.items()},
    }


def _is_finite(tensor: torch.Tensor) -> bool:
    # Formats of 8 bits have no such test of their own.
    return bool((tensor.float() if tensor.dtype.itemsize == 1 else tensor).isfinite().all())
