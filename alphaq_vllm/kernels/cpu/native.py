"""The native CPU kernel, called through ctypes: no torch header is compiled, so a library fits every torch."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import math
import os
import struct
from functools import cache

import torch

from alphaq_vllm import native_build
from alphaq_vllm.kernels.experts import PackedExperts
from alphaq_vllm.kernels.gate import SUPPORTED_ACTIVATIONS
from alphaq_vllm.kernels.routing import Routing
from alphaq_vllm.kernels.weights import MoEWeights
from alphaq_vllm.native_build import KERNEL, load

ROWS = 16
# Bytes to an activation: 2 hold bfloat16 and float16 with more precision than a product in these has.
DIGITS = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 3}
# What activations become, as a user chooses: integers of DIGITS bytes, or of one, less exact and in most cases faster.
ACTIVATIONS, PRECISIONS = "ALPHAQ_CPU_ACTIVATIONS", ("exact", "int8")
# Dtype of vectors.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Result of result.h.
DONE, UNKNOWN_EXPERT, OUT_OF_MEMORY = range(3)
# What is passed by address: Experts and Call of moe.h, Linear and LinearCall of linear.h, Threads of threads.h.
EXPERTS, CALL, LINEAR, LINEAR_CALL, THREADS = map(
    struct.Struct, ("@6P5q", "@4P6qi3fPi0P", "@2P4q", "@2P3qPi0P", "@Pi0P")
)

logger = logging.getLogger("alphaq_vllm")
_pointer, _int64 = ctypes.c_void_p, ctypes.c_int64


@cache
def best_instruction_set() -> str:
    """The instruction set to compute with, or ``none`` for torch; see ``choose_instruction_set``."""
    without = "AlphaQ computes experts with torch, many times slower than its CPU kernel"
    return native_build.choose_instruction_set(KERNEL, "AlphaQ's CPU kernel", without)


@cache
def library() -> ctypes.CDLL | None:
    """The kernel for this processor, or None if there is none."""
    name = best_instruction_set()
    return None if name == "none" else load(KERNEL, name)


def chosen_activations() -> str:
    """One of ``PRECISIONS``: what the environment variable ``ALPHAQ_CPU_ACTIVATIONS`` says, by default exact.

    Raises ValueError for another value.
    """
    choice = os.environ.get(ACTIVATIONS) or PRECISIONS[0]
    if choice not in PRECISIONS:
        raise ValueError(
            f"{ACTIVATIONS}: expected one of {', '.join(PRECISIONS)}, got {choice}: set one of these, or unset it"
        )
    return choice


def digits_of(dtype: torch.dtype) -> int:
    """Bytes to an activation of a dtype, as the user chose."""
    return 1 if chosen_activations() == "int8" else DIGITS[dtype]


def repack_(experts: PackedExperts, instruction_set: str | None = None) -> PackedExperts:
    """Bring a layer's matrices from the order of the checkpoint into that of native/layout.h, in their own memory.

    Args:
        experts: on the CPU; the order is the same for all instruction sets.
        instruction_set: which library does it, by default the best.

    Returns:
        The same tensors, marked as such.

    Raises:
        ValueError: for experts in another order, for a number of rows that is not a multiple of 16, and for a choice
            of activations that there is not.
    """
    if experts.order != "checkpoint":
        raise ValueError(f"experts: expected the order of the checkpoint, got that of a {experts.order}")
    if experts.N % ROWS:
        raise ValueError(f"experts: expected a multiple of {ROWS} rows, got {experts.N}")
    chosen_activations()
    kernel = load(KERNEL, instruction_set or best_instruction_set())
    shape = (experts.N, experts.K)
    for widths, starts in zip(experts.num_bits.tolist(), experts.offsets.tolist(), strict=True):
        for num_bits, start in zip(widths, starts, strict=True):
            _reorder(kernel, experts.packed.data_ptr() + start * experts.packed.itemsize, shape, num_bits)
    _reorder_groups(kernel, experts.grids)
    return dataclasses.replace(experts, order="cpu")


def repack_linear_(
    packed: torch.Tensor, scales: torch.Tensor, num_bits: int, instruction_set: str | None = None
) -> None:
    """Bring a linear layer from the order of linear_packing.py into that of native/layout.h, in its own memory.

    Args:
        packed: ``[N, words]`` int32, on the CPU.
        scales: ``[N, groups]`` bfloat16.
        num_bits: the width of its codes.
        instruction_set: which library does it, by default the best.

    Raises:
        ValueError: for a number of rows that is not a multiple of 16, and for activations that cannot be chosen.
    """
    chosen_activations()
    rows, words = packed.shape
    if rows % ROWS:
        raise ValueError(f"packed: expected a multiple of {ROWS} rows, got {rows}")
    kernel = load(KERNEL, instruction_set or best_instruction_set())
    _reorder(kernel, packed.data_ptr(), (rows, words * 32 // num_bits), num_bits, linear=True)
    _reorder_groups(kernel, scales)


def _reorder(kernel: ctypes.CDLL, at: int, shape: tuple[int, int], num_bits: int, linear: bool = False) -> None:
    arguments = (*map(_int64, shape), _int64(num_bits), _int64(linear))
    _check(kernel.alphaq_reorder(_pointer(at), *arguments, THREADS.pack(*_threads())))


def _reorder_groups(kernel: ctypes.CDLL, values: torch.Tensor) -> None:
    rows, groups = values.shape[:-1].numel(), values.shape[-1]
    arguments = map(_int64, (rows, groups, values.itemsize))
    _check(kernel.alphaq_reorder_groups(_pointer(values.data_ptr()), *arguments, THREADS.pack(*_threads())))


def fused_moe(
    x: torch.Tensor,
    weights: MoEWeights,
    routing: Routing,
    instruction_set: str | None = None,
    digits: int | None = None,
) -> torch.Tensor:
    """Compute a layer's routed experts: products of codes and activations in integers, all else in float32.

    With AMX, bfloat16 activations and many tokens to an expert, products are of weights rounded to bfloat16.

    Args:
        x: ``[num_tokens, hidden_size]`` bfloat16, float16 or float32.
        weights: the experts that this rank holds, in the order of ``repack_``.
        routing: the experts of each token.
        instruction_set: which library computes, by default the best.
        digits: bytes to an activation, by default ``digits_of`` x's dtype.

    Returns:
        ``[num_tokens, hidden_size]`` of x's dtype, a new tensor. Its bits do not depend on the number of threads.

    Raises:
        ValueError: for ids of experts that the layer does not have.
    """
    x, expert_ids = x.contiguous(), routing.local_expert_ids().contiguous()
    topk_weights, gate = routing.topk_weights.contiguous(), weights.gate
    out = x.new_empty(x.shape[0], weights.w2.N)
    call = CALL.pack(
        x.data_ptr(),
        topk_weights.data_ptr(),
        expert_ids.data_ptr(),
        out.data_ptr(),
        DTYPES[x.dtype],
        *expert_ids.shape,
        weights.w13.num_experts,
        routing.apply_router_weight_on_input,
        digits or digits_of(x.dtype),
        SUPPORTED_ACTIVATIONS.index(gate.activation),
        math.inf if gate.limit is None else gate.limit,
        gate.alpha,
        gate.beta,
        *_threads(),
    )
    w13, w2 = _experts(weights.w13, weights.w13_bias), _experts(weights.w2, weights.w2_bias)
    result = load(KERNEL, instruction_set or best_instruction_set()).alphaq_fused_moe(w13, w2, call)
    if result == UNKNOWN_EXPERT:
        raise ValueError(f"topk_ids: expected local ids below {weights.w13.num_experts}, got {int(expert_ids.max())}")
    _check(result)
    return out


def _experts(experts: PackedExperts, bias: torch.Tensor | None) -> bytes:
    pointers = [tensor.data_ptr() for tensor in experts.tensors]
    bias_of = (0, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype])
    return EXPERTS.pack(*pointers, *bias_of, experts.num_projections, experts.N, experts.K, experts.group_size)


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    num_bits: int,
    instruction_set: str | None = None,
    digits: int | None = None,
) -> torch.Tensor:
    """Multiply ``x [num_tokens, K]`` with the transpose of a matrix that ``repack_linear_`` prepared.

    Returns ``[num_tokens, N]`` of x's dtype, a new tensor. The last two arguments are those of ``fused_moe``.
    """
    (N, groups), K = scales.shape, packed.shape[1] * 32 // num_bits
    x, out = x.contiguous(), x.new_empty(x.shape[0], N)
    weights = LINEAR.pack(packed.data_ptr(), scales.data_ptr(), num_bits, N, K, K // groups)
    digits = digits or digits_of(x.dtype)
    call = LINEAR_CALL.pack(x.data_ptr(), out.data_ptr(), DTYPES[x.dtype], x.shape[0], digits, *_threads())
    _check(load(KERNEL, instruction_set or best_instruction_set()).alphaq_linear(weights, call))
    return out


def _check(result: int) -> None:
    if result != DONE:
        raise MemoryError("experts: the CPU kernel got no memory to work in")


def _threads() -> tuple[int, int]:
    """Torch's threads, which vLLM binds to cores: those of the one OpenMP library that both find first."""
    run = _parallel()
    return (run, torch.get_num_threads()) if run else (0, 1)


@cache
def _parallel() -> int | None:
    """The address of GOMP_parallel, which GNU's, LLVM's and Intel's OpenMP libraries all have on Linux."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, _pointer).value
    except AttributeError:
        logger.warning("AlphaQ computes experts on one thread: this process has no OpenMP library that it knows")
        return None
