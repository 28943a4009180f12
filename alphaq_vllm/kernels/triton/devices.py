"""What the launches, and the order of the weights in memory, depend on."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from alphaq_vllm.kernels.choice import chosen_kernels


class Device(NamedTuple):
    """One GPU. generation: the major number of an NVIDIA GPU's compute capability, else 0.

    overlap: kernels may be launched before the one ahead has ended, as ``launches`` says. ptx: kernels may contain PTX,
    which neither other GPUs nor Triton's interpreter know.
    """

    num_multiprocessors: int
    generation: int
    overlap: bool = False
    ptx: bool = False

    @property
    def quads(self) -> bool:
        """Whether both operands of a matrix instruction (mma.sync) come from registers: see ``layout``."""
        return self.generation in (8, 12)


@lru_cache
def device_of(device: torch.device) -> Device:
    """The GPU that a tensor is on; on a CPU, where the interpreter runs, something small."""
    if device.type != "cuda":
        return Device(num_multiprocessors=4, generation=9)
    properties = torch.cuda.get_device_properties(device)
    # Triton numbers AMD's GPUs otherwise, and none of the choices by generation is meant for them.
    generation = 0 if torch.version.hip else properties.major
    fast = chosen_kernels() == "fast"
    return Device(
        properties.multi_processor_count, generation, overlap=fast and generation >= 9, ptx=fast and generation > 0
    )
