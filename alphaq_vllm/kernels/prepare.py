"""The order in which a device computes fastest."""

from __future__ import annotations

from alphaq_vllm.kernels.choice import chosen_kernels
from alphaq_vllm.kernels.cpu import native
from alphaq_vllm.kernels.experts import PackedExperts
from alphaq_vllm.kernels.triton.layout import repack_


def prepare_(experts: PackedExperts) -> PackedExperts:
    """Bring a layer's matrices from the order of the checkpoint into that of their device, in their own memory.

    Args:
        experts: in the order of the checkpoint.

    Returns:
        The same tensors, marked with their order; unchanged on a CPU for which no kernel could be built, and where the
        user chose torch (``choice``).

    Raises:
        ValueError: for a choice that there is not, for experts in another order, and for a number of rows that the
            device cannot take.
    """
    if chosen_kernels() == "torch":
        return experts
    if experts.packed.is_cuda:
        return repack_(experts)
    return native.repack_(experts) if native.library() else experts
