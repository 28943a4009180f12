"""Heat maps of alpha and of bits over layers and experts, one column of pictures per projection."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from offline.source.families import ExpertMatrix

_SUFFIXES = (".png", ".pdf", ".svg")


def check_plot(path: Path) -> None:
    """Raise ValueError unless a picture can be drawn and its name says in what format."""
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"`plot`: expected a file name that ends in {', '.join(_SUFFIXES)}, got {str(path)!r}")
    if find_spec("matplotlib") is None:
        raise ValueError("`plot`: expected matplotlib to be installed, got none: pip install matplotlib")


def draw(path: Path, widths: Mapping[ExpertMatrix, int], alphas: Mapping[str, float]) -> None:
    """Draw the maps of bits and, above them where alphas are known, by matrix name, those of alpha."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    projections = list(dict.fromkeys(matrix.projection for matrix in widths))
    quantities = {"bits": {matrix.name: float(num_bits) for matrix, num_bits in widths.items()}}
    if alphas:
        quantities = {"alpha": dict(alphas), **quantities}
    figure = Figure(figsize=(4 * len(projections), 3.2 * len(quantities)), layout="constrained")
    axes = figure.subplots(len(quantities), len(projections), squeeze=False)
    for row, (quantity, values) in zip(axes, quantities.items(), strict=True):
        least, greatest = min(values.values()), max(values.values())
        for axis, projection in zip(row, projections, strict=True):
            table = _table([matrix for matrix in widths if matrix.projection == projection], values)
            image = axis.imshow(table, vmin=least, vmax=greatest, aspect="auto", interpolation="nearest")
            axis.set(title=f"{quantity}, {projection}", xlabel="expert", ylabel="MoE layer")
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=row)
    figure.savefig(path, dpi=150)


def _table(matrices: list[ExpertMatrix], values: Mapping[str, float]) -> np.ndarray:
    """Values of one projection, ``[layers, experts]``."""
    modules = list(dict.fromkeys(matrix.module for matrix in matrices))
    table = np.full((len(modules), 1 + max(matrix.expert for matrix in matrices)), np.nan)
    for matrix in matrices:
        table[modules.index(matrix.module), matrix.expert] = values[matrix.name]
    return table
