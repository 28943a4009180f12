"""Kernels that follow one another without a gap, where the GPU can (CUDA's programmatic dependent launch).

A kernel lets the next one start as soon as it has waited for the one ahead, which has waited itself; so before its own
wait it may read what earlier kernels than the one ahead have written, and must not write. A layer's first kernel is
launched as any other, for who comes before it is unknown.
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
    """Every program calls this once, before it reads what the kernel ahead writes, writes anything, or ends."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
