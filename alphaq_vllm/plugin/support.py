"""What cannot be served, said before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alphaq_vllm.kernels import Gate
from alphaq_vllm.plugin._compat import FusedMoEConfig, current_platform, get_current_vllm_config
from alphaq_vllm.plugin.modular import UNGATED, exchanges_tokens, is_gated
from alphaq_vllm.ranks import SHARE, fitting_ranks

# gpt-oss's: experts with biases, whose rows of gate and up alternate in a checkpoint.
GPT_OSS_ACTIVATION = "swigluoai"
# vLLM's other activations: as they are, gated or not, and those that take the limit that a model has.
PLAIN = ("silu", "gelu", "gelu_tanh", *(name + UNGATED for name in ("silu", "gelu", "gelu_tanh", "relu2")))
LIMITED = ("silu", "swigluoai_uninterleave")
# Its limit is the same in all models.
SWIGLUSTEP, SWIGLUSTEP_LIMIT = "swiglustep", 7.0
# What brings tokens to the ranks of their experts as rows with ids. Other backends batch them by expert, quantize them,
# or have experts of their own.
ALL2ALL_BACKENDS = ("allgather_reducescatter", "deepep_high_throughput", "deepep_v2")
# vLLM fills parameters with small random numbers, to profile.
DUMMY = "dummy"
# These read back what a server held in memory. There, weights lie as the kernels of its device read them.
MEMORY_FORMATS = ("sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache")
# In bytes, what DeepEP copies at once.
DEEPEP_UNIT = 512


def has_cpu_int4_kernel() -> bool:
    """Whether this build of vLLM can multiply with 4-bit linear layers on a CPU: on processors without AVX-512 it
    loads them, and dies at the first request.
    """
    return hasattr(torch.ops._C, "cpu_gemm_wna16")


def check_linear_kernel(prefix: str, num_bits: int, option: str) -> None:
    """Raise ValueError if vLLM would find out only while serving that it cannot compute a linear layer.

    option: of the converter, which decides its width. Where vLLM has no kernel at all for a width, it says so itself,
    when the layer is created.
    """
    if num_bits == 4 and current_platform.is_cpu() and not has_cpu_int4_kernel():
        raise ValueError(
            f"{prefix}: vLLM has no kernel for 4-bit linear layers on this processor, which takes AVX-512: install a "
            f"C++ compiler for AlphaQ's own, or convert with {option} 16"
        )


def check_load_format(load_format: str) -> None:
    """Raise ValueError for a format that does not load the tensors of a checkpoint."""
    if load_format in MEMORY_FORMATS:
        raise ValueError(
            f"--load-format {load_format}: expected a format that reads the tensors of a checkpoint, such as auto, got "
            "one that reads back what vLLM held in memory, where AlphaQ's weights lie in another order: serve the "
            "checkpoint that convert wrote, without --load-format"
        )


def gate_of(moe: FusedMoEConfig, prefix: str) -> Gate:
    """What vLLM has between the two products of an expert without biases.

    prefix: the layer's name, for messages.
    Raises ValueError for experts with biases and for what is not computed here.
    """
    activation, limit = moe.activation.value, moe.swiglu_limit
    if not moe.has_bias:
        if limit is not None and activation in LIMITED:
            return Gate("silu", float(limit), float(moe.swiglu_alpha or 1), float(moe.swiglu_beta or 0))
        if limit is None and activation == SWIGLUSTEP:
            return Gate(activation, SWIGLUSTEP_LIMIT)
        if limit is None and activation in PLAIN:
            return Gate(activation.removesuffix(UNGATED))
    raise ValueError(
        f"{prefix}: expected experts without bias, an activation out of {', '.join((*PLAIN, SWIGLUSTEP))}, or with a "
        f"limit out of {', '.join(LIMITED)}, or gpt-oss's ({GPT_OSS_ACTIVATION} with bias), got {activation} with "
        f"has_bias={moe.has_bias} and swiglu_limit={limit}: this model cannot be served with --quantization alphaq yet"
    )


def check_experts(moe: FusedMoEConfig, prefix: str, group_size: int, num_experts: int, has_gate: bool = True) -> None:
    """Raise ValueError if a layer of routed experts cannot be served as vLLM was asked to.

    prefix: the layer's name, for messages; num_experts, has_gate: how many the bit map has, and whether with gates.
    """
    _check_groups(moe, prefix, group_size)
    _check_model(moe, prefix, num_experts, has_gate)
    _check_parallel(moe, prefix)
    if moe.is_lora_enabled:
        _check_lora(prefix, get_current_vllm_config().lora_config.target_modules)


def _check_groups(moe: FusedMoEConfig, prefix: str, group_size: int) -> None:
    size, tp_size = moe.intermediate_size, moe.moe_parallel_config.tp_size
    for side, columns in (("hidden_size", moe.hidden_dim), ("intermediate_size", size)):
        if columns % group_size:
            raise ValueError(
                f"{prefix}: {side}={columns} is not divisible by group_size={group_size}: config.json does not belong "
                "to these weights, convert again"
            )
    if size % (SHARE * tp_size):
        raise ValueError(
            f"{prefix}: intermediate_size={size} over --tensor-parallel-size {tp_size} is {size / tp_size:g} "
            f"per rank, which is not divisible by {SHARE}: use a tensor parallel size out of {fitting_ranks(size)}, or "
            "add --enable-expert-parallel"
        )


def _check_model(moe: FusedMoEConfig, prefix: str, num_experts: int, has_gate: bool) -> None:
    if moe.in_dtype == torch.float32 and not current_platform.is_cpu():
        raise ValueError(f"{prefix}: expected --dtype bfloat16 or float16, got float32, which is served on CPUs only")
    if num_experts != moe.num_experts and not moe.moe_parallel_config.enable_eplb:
        raise ValueError(
            f"{prefix}: the model has {moe.num_experts} experts, the bit map {num_experts}: "
            "config.json does not belong to these weights, convert again"
        )
    if not (moe.activation.value == GPT_OSS_ACTIVATION and moe.has_bias and moe.swiglu_limit is None):
        gate_of(moe, prefix)
    if has_gate != is_gated(moe):
        raise ValueError(
            f"{prefix}: expected the bit map of experts {'with' if is_gated(moe) else 'without'} a gate, as the model "
            f"has them, got one {'with' if has_gate else 'without'}: config.json does not belong to these weights, "
            "convert again"
        )


def _check_parallel(moe: FusedMoEConfig, prefix: str) -> None:
    parallel = moe.moe_parallel_config
    if parallel.enable_eplb:
        raise ValueError(
            f"{prefix}: --enable-eplb moves experts from rank to rank, which takes experts of one size, and these "
            "differ in width: serve without --enable-eplb"
        )
    backend = parallel.all2all_backend
    exchanged = parallel.use_ep and exchanges_tokens(moe)
    if backend == "passthrough" or (exchanged and backend not in ALL2ALL_BACKENDS):
        raise ValueError(
            f"{prefix}: --all2all-backend {backend} does not hand out tokens in the way that experts of different "
            f"widths take them: use one of {', '.join(ALL2ALL_BACKENDS)}"
        )
    if exchanged and backend.startswith("deepep"):
        _check_deepep(moe, prefix, backend)
    if parallel.use_ep and parallel.pcp_size > 1:
        raise ValueError(
            f"{prefix}: --prefill-context-parallel-size {parallel.pcp_size} with --enable-expert-parallel is not "
            "supported with --quantization alphaq: leave out one of them"
        )


def _check_deepep(moe: FusedMoEConfig, prefix: str, backend: str) -> None:
    if moe.in_dtype != torch.bfloat16:
        raise ValueError(f"{prefix}: --all2all-backend {backend} expects --dtype bfloat16, got {moe.in_dtype}")
    if moe.hidden_dim * moe.in_dtype.itemsize % DEEPEP_UNIT:
        raise ValueError(
            f"{prefix}: --all2all-backend {backend} expects a hidden size divisible by "
            f"{DEEPEP_UNIT // moe.in_dtype.itemsize}, got {moe.hidden_dim}: use --all2all-backend {ALL2ALL_BACKENDS[0]}"
        )


def _check_lora(prefix: str, target_modules: Sequence[str] | None) -> None:
    if target_modules is None or any("experts" in target.split(".") for target in target_modules):
        raise ValueError(
            f"{prefix}: LoRA on routed experts is not supported with --quantization alphaq: name the other layers that "
            "adapters may change, as in --lora-target-modules q_proj k_proj v_proj o_proj"
        )
