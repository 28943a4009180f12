"""``fused_moe``, and the opaque operator ``alphaq::fused_moe`` behind it, which torch.compile does not look into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from alphaq_vllm.kernels import torch_layer
from alphaq_vllm.kernels.cpu import native
from alphaq_vllm.kernels.experts import Order, PackedExperts
from alphaq_vllm.kernels.gate import Gate
from alphaq_vllm.kernels.routing import Routing
from alphaq_vllm.kernels.weights import MoEWeights

X_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

torch.library.define(
    "alphaq::fused_moe",
    "(Tensor x, Tensor[] w13, int w13_group_size, int[] w13_widths, Tensor[] w2, int w2_group_size, int[] w2_widths, "
    "Tensor topk_weights, Tensor topk_ids, Tensor? w13_bias, Tensor? w2_bias, Tensor? expert_map, str activation, "
    "float? limit, float alpha, float beta, bool apply_router_weight_on_input, str order) -> Tensor",
)


def fused_moe(x: torch.Tensor, weights: MoEWeights, routing: Routing) -> torch.Tensor:
    """Compute a layer's routed experts: the sum of ``weight * down(gated(gate(x), up(x)))`` over a token's experts.

    Of experts without a gate it is the sum of ``weight * down(activated(up(x)))``.

    Args:
        x: ``[num_tokens, hidden_size]`` bfloat16, float16, or (on CPU) float32.
        weights: the experts that this rank holds, on x's device.
        routing: the experts of each token, on x's device.

    Returns:
        ``[num_tokens, hidden_size]`` of x's dtype, a new tensor.

    Raises:
        TypeError: for dtypes of x or of the routing other than these.
        ValueError: for shapes other than these, and for router weights on the input with more experts than one a token.
    """
    _check_inputs(x, weights, routing)
    w13, w2 = weights.w13, weights.w2
    return torch.ops.alphaq.fused_moe(
        x,
        w13.tensors,
        w13.group_size,
        w13.widths,
        w2.tensors,
        w2.group_size,
        w2.widths,
        routing.topk_weights,
        routing.topk_ids,
        weights.w13_bias,
        weights.w2_bias,
        routing.expert_map,
        *weights.gate,
        routing.apply_router_weight_on_input,
        w13.order,
    )


def _check_inputs(x: torch.Tensor, weights: MoEWeights, routing: Routing) -> None:
    """Check what differs from call to call; the weights were checked when they were put together."""
    topk_weights, topk_ids = routing.topk_weights, routing.topk_ids
    if x.dtype not in X_DTYPES:
        raise TypeError(f"x: expected one of {X_DTYPES}, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] != weights.w13.K:
        raise ValueError(f"x: expected shape [num_tokens, {weights.w13.K}], got {list(x.shape)}")
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
    if routing.apply_router_weight_on_input and topk_ids.shape[1] != 1:
        raise ValueError(f"apply_router_weight_on_input: expected top_k=1, got {topk_ids.shape[1]}")


def _fused_moe(
    compute: Callable[[torch.Tensor, MoEWeights, Routing], torch.Tensor],
    x: torch.Tensor,
    w13: Sequence[torch.Tensor],
    w13_group_size: int,
    w13_widths: Sequence[int],
    w2: Sequence[torch.Tensor],
    w2_group_size: int,
    w2_widths: Sequence[int],
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    activation: str,
    limit: float | None,
    alpha: float,
    beta: float,
    apply_router_weight_on_input: bool,
    order: Order,
) -> torch.Tensor:
    """Put together again what ``fused_moe`` took apart, and compute."""
    weights = MoEWeights(
        _experts(w13, w13_group_size, w13_widths, order),
        _experts(w2, w2_group_size, w2_widths, order),
        w13_bias,
        w2_bias,
        Gate(activation, limit, alpha, beta),
        checked=True,
    )
    return compute(x, weights, Routing(topk_weights, topk_ids, expert_map, apply_router_weight_on_input))


def _experts(tensors: Sequence[torch.Tensor], group_size: int, widths: Sequence[int], order: Order) -> PackedExperts:
    packed, scales, grids, num_bits, offsets = tensors
    return PackedExperts(packed, scales, grids, num_bits, offsets, group_size, tuple(widths), order)


@torch.library.impl("alphaq::fused_moe", "cpu")
def _fused_moe_cpu(*args: Any) -> torch.Tensor:
    # The last is the order of the experts.
    return _fused_moe(native.fused_moe if args[-1] == "cpu" else torch_layer.fused_moe, *args)


@torch.library.impl("alphaq::fused_moe", "cuda")
def _fused_moe_cuda(*args: Any) -> torch.Tensor:
    if args[-1] == "checkpoint":
        return _fused_moe(torch_layer.fused_moe, *args)
    # Triton may be absent where there is no GPU.
    from alphaq_vllm.kernels.triton import layer as triton_layer

    return _fused_moe(triton_layer.fused_moe, *args)


@torch.library.register_fake("alphaq::fused_moe")
def _fused_moe_fake(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
