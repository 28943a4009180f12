"""Kernels that follow one another without a gap, where the GPU can (CUDA's programmatic dependent launch).

Every kernel first lets the next one start, as soon as there is room; every kernel but a layer's first was launched so
early that it must wait for the one ahead. As each waits before it touches memory, the one ahead has waited too, and so
everything before it has ended. A layer's first kernel is launched as any other, for who comes before it is unknown.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


class Launches(NamedTuple):
    """Whether kernels are launched before the one ahead has ended."""

    overlap: bool

    @property
    def first(self) -> dict[str, bool]:
        """Options of a layer's first kernel."""
        return {"OVERLAP": self.overlap}

    @property
    def next(self) -> dict[str, bool]:
        """Options of every kernel after that. Other backends than NVIDIA's do not know the launch option."""
        return {"OVERLAP": True, "launch_pdl": True} if self.overlap else {"OVERLAP": False}


APART = Launches(overlap=False)


@triton.jit
def wait_for_previous_kernel(OVERLAP: tl.constexpr):
    """To be called before any access to memory; of no effect where kernels do not overlap."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
