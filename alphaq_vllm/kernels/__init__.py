"""Mixture-of-Experts layers on packed weights of mixed widths: Triton on GPUs, torch on CPUs."""

from alphaq_vllm.kernels.experts import PackedExperts, expert_offsets
from alphaq_vllm.kernels.layout import repack_
from alphaq_vllm.kernels.op import fused_moe
from alphaq_vllm.kernels.reference import GPT_OSS, SUPPORTED_ACTIVATIONS, Gate

__all__ = ["GPT_OSS", "SUPPORTED_ACTIVATIONS", "Gate", "PackedExperts", "expert_offsets", "fused_moe", "repack_"]
