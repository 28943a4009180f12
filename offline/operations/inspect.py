"""What an AlphaQ checkpoint is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from alphaq_vllm.format import FORMAT_VERSION, PACKED, AlphaQSpec, stored_bits_per_weight
from offline.allocation.bit_map import average_bits
from offline.operations.heatmaps import check_plot, draw
from offline.operations.plan import scale_bytes
from offline.operations.summary import count_widths
from offline.sensitivity.stats import STATS, read_statistics
from offline.source.alphaq import check_alphaq
from offline.source.checkpoint import Checkpoint, open_checkpoint
from offline.source.families import ExpertMatrix
from offline.source.recognition import draft_tensors


def inspect(model: str | Path, plot: str | Path | None = None) -> dict[str, Any]:
    """Describe a checkpoint: sizes, widths by layer and projection, and alpha where its statistics are with it.

    Args:
        model: An AlphaQ checkpoint: a directory, or a name on the Hugging Face Hub.
        plot: A file for heat maps of alpha and bits, as PNG, PDF or SVG, or None.

    Returns:
        What ``python -m offline.inspect --json`` prints: sizes in bytes, widths in bits.

    Raises:
        ValueError: For a checkpoint that is not as its config says, and for a plot of another kind.
        OSError: For files that are missing or cannot be read.
    """
    if plot:
        check_plot(Path(plot))
    checkpoint = open_checkpoint(str(model))
    widths, drafts = _apart(checkpoint, check_alphaq(checkpoint))
    alphas = _alphas(checkpoint, widths)
    if plot:
        draw(Path(plot), widths, alphas)
    return {**_describe(checkpoint, widths, alphas), "drafts": count_widths(drafts)}


def _apart(
    checkpoint: Checkpoint, widths: Mapping[ExpertMatrix, int]
) -> tuple[dict[ExpertMatrix, int], dict[str, int]]:
    """The widths of the decoder's matrices, and by name those of layers that only draft."""
    tensors = draft_tensors(checkpoint)
    drafts = {matrix for matrix in widths if f"{matrix.name}.{PACKED}" in tensors}
    others = {matrix: num_bits for matrix, num_bits in widths.items() if matrix not in drafts}
    return others, {matrix.name: widths[matrix] for matrix in drafts}


def _describe(
    checkpoint: Checkpoint, widths: Mapping[ExpertMatrix, int], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """widths: of the matrices; alphas: by matrix name, empty if they are not known."""
    bits = {matrix.name: num_bits for matrix, num_bits in widths.items()}
    group_size = AlphaQSpec.from_dict(checkpoint.config["quantization_config"]).group_size
    average, numel = average_bits(bits, list(widths)), sum(matrix.numel for matrix in widths)
    rows: dict[tuple[str, str], list[ExpertMatrix]] = defaultdict(list)
    for matrix in widths:
        rows[matrix.module, matrix.projection].append(matrix)
    return {
        "checkpoint": str(checkpoint.path),
        "model_type": checkpoint.config.get("model_type"),
        "format_version": FORMAT_VERSION,
        "group_size": group_size,
        "matrices": len(widths),
        "bits": average,
        "stored_bits": stored_bits_per_weight(average, group_size) + 8 * scale_bytes(widths) / numel,
        "size": checkpoint.nbytes,
        "widths": count_widths(bits),
        "layers": [
            {
                "module": module,
                "projection": projection,
                "bits": average_bits(bits, matrices),
                "widths": count_widths({matrix.name: bits[matrix.name] for matrix in matrices}),
                "alpha": median(alphas[matrix.name] for matrix in matrices) if alphas else None,
            }
            for (module, projection), matrices in rows.items()
        ],
        "alpha": _alpha_by_width(bits, alphas),
    }


def _alphas(checkpoint: Checkpoint, widths: Mapping[ExpertMatrix, int]) -> dict[str, float]:
    path = checkpoint.path / STATS
    if not path.exists():
        return {}
    return {stats.name: stats.alpha for stats in read_statistics(path).of(matrix.name for matrix in widths)}


def _alpha_by_width(bits: Mapping[str, int], alphas: Mapping[str, float]) -> dict[int, tuple[float, float, float]]:
    """The least, median and greatest alpha of the matrices of each width."""
    groups: dict[int, list[float]] = defaultdict(list)
    for name, alpha in alphas.items():
        groups[bits[name]].append(alpha)
    return {width: (min(group), median(group), max(group)) for width, group in sorted(groups.items())}
