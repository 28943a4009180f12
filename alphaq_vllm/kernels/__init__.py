"""Mixture-of-Experts layers on packed weights of mixed widths: Triton on GPUs, native code on CPUs."""

from alphaq_vllm.kernels.experts import PackedExperts, expert_offsets
from alphaq_vllm.kernels.gate import GPT_OSS, SILU, SUPPORTED_ACTIVATIONS, Gate
from alphaq_vllm.kernels.op import fused_moe
from alphaq_vllm.kernels.prepare import prepare_
from alphaq_vllm.kernels.routing import Routing
from alphaq_vllm.kernels.triton.layout import repack_
from alphaq_vllm.kernels.weights import MoEWeights

__all__ = [
    "GPT_OSS",
    "SILU",
    "SUPPORTED_ACTIVATIONS",
    "Gate",
    "MoEWeights",
    "PackedExperts",
    "Routing",
    "expert_offsets",
    "fused_moe",
    "prepare_",
    "repack_",
]
