"""A bit map: the width of every expert matrix, by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alphaq_vllm.format import SUPPORTED_BITS
from offline.allocation.modes import Sized
from offline.messages import some
from offline.strict_json import unique


def read_bit_map(path: Path) -> dict[str, int]:
    """Read ``{"<matrix name>": bits}``. Raises ValueError for anything but names, each once, and supported widths."""
    try:
        bits = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object of matrix names and widths, got {error}") from error
    if not isinstance(bits, dict):
        raise ValueError(f"{path}: expected a JSON object of matrix names and widths, got {bits!r:.80}")
    check_widths(str(path), bits)
    return bits


def check_widths(where: str, bits: Mapping[str, Any]) -> None:
    """Raise ValueError, naming ``where`` they are from and the matrix, unless all widths are supported."""
    for name, width in bits.items():
        if type(width) is not int or width not in SUPPORTED_BITS:
            raise ValueError(f"{where}: {name}: expected one of the widths {SUPPORTED_BITS}, got {width!r:.80}")


def check_bit_map(bits: Mapping[str, int], matrices: Sequence[Sized]) -> None:
    """Raise ValueError unless the bit map names every expert matrix and nothing else."""
    names = {matrix.name: None for matrix in matrices}
    missing, unknown = [name for name in names if name not in bits], [name for name in bits if name not in names]
    if missing:
        raise ValueError(f"bit map: expected all {len(names)} expert matrices, got no width for {some(missing)}")
    if unknown:
        raise ValueError(f"bit map: expected only the expert matrices of this model, got also {some(unknown)}")


def average_bits(bits: Mapping[str, int], matrices: Sequence[Sized]) -> float:
    """The average width, weighted by numel."""
    return sum(bits[m.name] * m.numel for m in matrices) / sum(m.numel for m in matrices)
