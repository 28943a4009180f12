"""``fused_moe``, and the opaque operator ``alphaq::fused_moe`` behind it, which torch.compile does not look into."""

from __future__ import annotations

import torch

from alphaq_vllm.kernels.cpu import fused_moe_cpu
from alphaq_vllm.kernels.experts import PackedExperts
from alphaq_vllm.kernels.reference import SILU, SUPPORTED_ACTIVATIONS, Gate

X_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

torch.library.define(
    "alphaq::fused_moe",
    "(Tensor x, Tensor[] w13, int w13_group_size, int[] w13_widths, Tensor[] w2, int w2_group_size, int[] w2_widths, "
    "Tensor topk_weights, Tensor topk_ids, Tensor? w13_bias, Tensor? w2_bias, Tensor? expert_map, str activation, "
    "float? limit, float alpha, float beta, bool apply_router_weight_on_input) -> Tensor",
)


def fused_moe(
    x: torch.Tensor,
    w13: PackedExperts,
    w2: PackedExperts,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    gate: Gate = SILU,
    apply_router_weight_on_input: bool = False,
) -> torch.Tensor:
    """The routed experts of one layer: the sum of ``weight * down(gated(gate(x), up(x)))`` over a token's experts.

    x: ``[num_tokens, hidden_size]`` bfloat16, float16, or (on CPU) float32.
    w13: gate and up, N = intermediate size of this rank, K = hidden_size. w2: down, N and K exchanged. Both tiled by
    ``repack_`` on a GPU, both in the order of the checkpoint on a CPU.
    w13_bias: ``[E, 2, N]``, of gate and up. w2_bias: ``[E, hidden_size]``. Of any floating dtype.
    topk_weights: ``[num_tokens, top_k]`` float32.
    topk_ids: ``[num_tokens, top_k]`` int32 or int64, global expert ids; -1 marks padding, which is skipped.
    expert_map: ``[global_num_experts]`` int32, global to local id, -1 for experts of other ranks, which are skipped.
    gate: how gate and up become one.
    apply_router_weight_on_input: the router's weight multiplies x, not the expert's output; needs top_k = 1.
    Returns ``[num_tokens, hidden_size]`` of x's dtype, a new tensor.
    Raises ValueError or TypeError for shapes, dtypes and activations other than these.
    """
    _check_weights(w13, w2, w13_bias, w2_bias)
    _check_inputs(x, w13, topk_weights, topk_ids)
    if gate.activation not in SUPPORTED_ACTIVATIONS:
        raise ValueError(f"activation: expected one of {SUPPORTED_ACTIVATIONS}, got {gate.activation!r}")
    if apply_router_weight_on_input and topk_ids.shape[1] != 1:
        raise ValueError(f"apply_router_weight_on_input: expected top_k=1, got {topk_ids.shape[1]}")
    return torch.ops.alphaq.fused_moe(
        x,
        w13.tensors,
        w13.group_size,
        w13.widths,
        w2.tensors,
        w2.group_size,
        w2.widths,
        topk_weights,
        topk_ids,
        w13_bias,
        w2_bias,
        expert_map,
        *gate,
        apply_router_weight_on_input,
    )


def _check_weights(
    w13: PackedExperts, w2: PackedExperts, w13_bias: torch.Tensor | None, w2_bias: torch.Tensor | None
) -> None:
    if (w13.num_projections, w2.num_projections) != (2, 1):
        raise ValueError(
            f"w13, w2: expected 2 and 1 projections per expert, got {w13.num_projections} and {w2.num_projections}"
        )
    if (w2.num_experts, w2.N, w2.K) != (w13.num_experts, w13.K, w13.N):
        raise ValueError(
            f"w2: expected {w13.num_experts} experts [{w13.K}, {w13.N}] to match w13, "
            f"got {w2.num_experts} experts [{w2.N}, {w2.K}]"
        )
    on_gpu = w13.packed.is_cuda
    if (w13.tiled, w2.tiled) != (on_gpu, on_gpu):
        raise ValueError(
            f"w13, w2: expected {'experts tiled by repack_' if on_gpu else 'the order of the checkpoint'} on "
            f"{w13.packed.device}, got tiled={w13.tiled} and tiled={w2.tiled}"
        )
    shapes = {"w13_bias": (w13_bias, (w13.num_experts, 2, w13.N)), "w2_bias": (w2_bias, (w2.num_experts, w2.N))}
    for name, (bias, shape) in shapes.items():
        if bias is not None and (bias.shape != shape or not bias.is_contiguous()):
            raise ValueError(f"{name}: expected a contiguous tensor {list(shape)}, got {list(bias.shape)}")


def _check_inputs(x: torch.Tensor, w13: PackedExperts, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
    if x.dtype not in X_DTYPES:
        raise TypeError(f"x: expected one of {X_DTYPES}, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] != w13.K:
        raise ValueError(f"x: expected shape [num_tokens, {w13.K}], got {list(x.shape)}")
    if topk_ids.dtype not in (torch.int32, torch.int64) or topk_weights.dtype != torch.float32:
        raise TypeError(
            "topk_ids, topk_weights: expected int32 or int64, and float32, "
            f"got {topk_ids.dtype} and {topk_weights.dtype}"
        )
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0] or topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_ids, topk_weights: expected two shapes [{x.shape[0]}, top_k], "
            f"got {list(topk_ids.shape)} and {list(topk_weights.shape)}"
        )


def _fused_moe(
    compute, tiled, x, w13, w13_group_size, w13_widths, w2, w2_group_size, w2_widths, topk_weights,
    topk_ids, w13_bias, w2_bias, expert_map, activation, limit, alpha, beta, apply_router_weight_on_input,
):  # fmt: skip
    w13 = PackedExperts(*w13, w13_group_size, tuple(w13_widths), tiled)
    w2 = PackedExperts(*w2, w2_group_size, tuple(w2_widths), tiled)
    gate = Gate(activation, limit, alpha, beta)
    return compute(
        x, w13, w2, topk_weights, topk_ids, w13_bias, w2_bias, expert_map, gate, apply_router_weight_on_input
    )


@torch.library.impl("alphaq::fused_moe", "cpu")
def _fused_moe_cpu(*args):
    return _fused_moe(fused_moe_cpu, False, *args)


@torch.library.impl("alphaq::fused_moe", "cuda")
def _fused_moe_cuda(*args):
    # Triton may be absent where there is no GPU.
    from alphaq_vllm.kernels.moe_triton import fused_moe_triton

    return _fused_moe(fused_moe_triton, True, *args)


@torch.library.register_fake("alphaq::fused_moe")
def _fused_moe_fake(x, *args):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
