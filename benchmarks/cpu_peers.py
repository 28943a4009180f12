"""Other ways to compute a layer's routed experts on a CPU, on random weights; one that cannot run here says why.

A peer takes a shape and returns ``layer(x, topk_weights, topk_ids)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers import GROUP_SIZE, sizes

Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def torch_bf16(shape: Any) -> Layer:
    """A loop over experts with torch's products of bfloat16: what one would write."""
    w13, w2 = _dense(shape)

    def layer(x, topk_weights, topk_ids):
        out = torch.zeros_like(x)
        for expert in topk_ids.unique().tolist():
            tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up = (x[tokens] @ w13[expert].T).chunk(2, -1)
            routed = (torch.nn.functional.silu(gate) * up) @ w2[expert].T
            out.index_add_(0, tokens, routed * topk_weights[tokens, slots, None].to(x.dtype))
        return out

    return layer


def vllm_bf16(shape: Any) -> Layer:
    """vLLM's operator for unquantized experts: with AMX where there is one."""
    from vllm import _custom_ops as ops

    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    w13, w2 = (ops.cpu_prepack_moe_weight(weight, isa) for weight in _dense(shape))

    def layer(x, topk_weights, topk_ids):
        out = torch.empty_like(x)
        ops.cpu_fused_moe(out, x, w13, w2, None, None, topk_weights, topk_ids, "silu", isa)
        return out

    return layer


def vllm_int4(shape: Any) -> Layer:
    """vLLM's operator for experts of 4 bits with zero points, which rounds activations to 8 bits: with AMX alone."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import prepare_int4_moe_layer_for_cpu

    if not torch.cpu._is_amx_tile_supported():
        raise OSError("it takes AMX")
    packed, scales = [], []
    for N, K in sizes(shape):
        packed.append(torch.randint(-(2**31), 2**31, (shape.num_experts, K // 8, N), dtype=torch.int32))
        scales.append(torch.rand(shape.num_experts, K // GROUP_SIZE, N).bfloat16() / 8 / K**0.5)
    w13, w2, s13, s2, z13, z2 = prepare_int4_moe_layer_for_cpu(*packed, *scales)

    def layer(x, topk_weights, topk_ids):
        out = torch.empty_like(x)
        ops.fused_experts_cpu(
            out, x, w13, w2, topk_weights, topk_ids, ops.CPUQuantMethod.INT4_W4A8, s13, s2, z13, z2, None
        )
        return out

    return layer


def _dense(shape: Any) -> list[torch.Tensor]:
    """Uniform, which takes a quarter of the time that normal takes."""
    return [
        torch.empty(shape.num_experts, N, K, dtype=torch.bfloat16).uniform_(-1, 1).div_(K**0.5) for N, K in sizes(shape)
    ]


# With the bits that a weight is stored in: scales and zero points of 16 and 4 bits for vLLM's 4.
PEERS: dict[str, tuple[Callable[[Any], Layer], float]] = {
    "torch-bf16": (torch_bf16, 16),
    "vllm-bf16": (vllm_bf16, 16),
    "vllm-int4": (vllm_int4, 4 + 20 / GROUP_SIZE),
}
