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
    def kurtosis(self) -> float:
        """Of its weights: the fourth standardized moment."""
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
    layer; ``kurtosis``, the error relative to the variance of the weights, times their kurtosis; or ``analytic``,
    ``variance * 4 ** -width`` (AlphaQ, arXiv 2606.04980).
    """
    if kind != "analytic":
        mse = np.array([[matrix.mse[width] for width in widths] for matrix in matrices])
        if kind == "propagated":
            # Gains are of whole matrices.
            mse *= [[(m.gain or 0.0) / m.numel] for m in matrices]
        elif kind == "kurtosis":
            # Weights without variance are stored exactly.
            mse *= [[m.kurtosis / m.variance if m.variance else 0.0] for m in matrices]
        return mse
    return np.outer([matrix.variance for matrix in matrices], 4.0 ** -np.array(widths))
