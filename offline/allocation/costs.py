"""What an allocation minimises: the error that each width leaves in each matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from offline.allocation.modes import Sized


@runtime_checkable
class Sensitivity(Sized, Protocol):
    """What has to be known of a matrix; ``MatrixStats`` is that."""

    @property
    def alpha(self) -> float:
        """Hill exponent of its spectrum."""
        ...

    @property
    def alpha_noise(self) -> float:
        """Relative standard deviation of that estimate."""
        ...

    @property
    def variance(self) -> float:
        """Of its weights."""
        ...

    @property
    def reach(self) -> float:
        """Squared error of its expert's output for a mean squared error of 1 in it, relative to it."""
        ...

    @property
    def mse(self) -> Mapping[int, float]:
        """Mean squared quantization error by width."""
        ...

    @property
    def gain(self) -> float | None:
        """Squared error of its layer's output for a mean squared error of 1 in it, if that was measured."""
        ...


def noise(matrices: Sequence[Sensitivity], widths: Sequence[int], kind: str) -> np.ndarray:
    """Expected squared error per weight, ``[matrices, widths]`` float64.

    kind: ``measured``, the error of the quantizer itself; ``propagated``, as much of it as arrives at the output of the
    layer; ``expert``, as much of it as arrives at the output of the expert for random inputs, with layers that count
    alike; or ``analytic``, ``variance * 4 ** -width`` (AlphaQ, arXiv 2606.04980).
    """
    if kind != "analytic":
        mse = np.array([[matrix.mse[width] for width in widths] for matrix in matrices])
        if kind == "propagated":
            # Gains are of whole matrices.
            mse *= [[(m.gain or 0.0) / m.numel] for m in matrices]
        elif kind == "expert":
            mse *= relative_reach(matrices)[:, None]
        return mse
    return np.outer([matrix.variance for matrix in matrices], 4.0 ** -np.array(widths))


def relative_reach(matrices: Sequence[Sensitivity]) -> np.ndarray:
    """The reach of each matrix by the mean of its layer, per weight, ``[matrices]``; 0 in a layer without any."""
    by_layer: dict[str, list[float]] = {}
    modules = [matrix.name.rsplit(".", 2)[0] for matrix in matrices]
    for module, matrix in zip(modules, matrices, strict=True):
        by_layer.setdefault(module, []).append(matrix.reach)
    means = {module: np.mean(values) or 1.0 for module, values in by_layer.items()}
    return np.array([m.reach / means[module] / m.numel for module, m in zip(modules, matrices, strict=True)])
