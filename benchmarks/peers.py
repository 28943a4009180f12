"""Other kernels for the same layer, on random weights; each needs its package, and one that is missing says so.

A peer takes a shape and returns a function that makes one layer: ``layer(x, topk_weights, topk_ids)``.
"""

from __future__ import annotations

from typing import Any

import torch

GROUP_SIZE = 128


def torch_bf16(shape: Any):
    """PyTorch's grouped matrix product: what bfloat16 weights cost without vLLM."""

    def make_layer():
        w13, w2 = _dense(shape)

        def layer(x, topk_weights, topk_ids):
            order = topk_ids.flatten().argsort(stable=True)
            experts = torch.arange(shape.num_experts, device=x.device, dtype=topk_ids.dtype)
            ends = torch.searchsorted(topk_ids.flatten()[order], experts, right=True).to(torch.int32)
            gate_up = torch._grouped_mm(x[order // shape.top_k], w13.transpose(1, 2), offs=ends)
            gate, up = gate_up.chunk(2, -1)
            routed = torch._grouped_mm(torch.nn.functional.silu(gate) * up, w2.transpose(1, 2), offs=ends)
            weighted = routed * topk_weights.flatten()[order, None].to(routed.dtype)
            return torch.zeros_like(x).index_add_(0, order // shape.top_k, weighted)

        return layer

    return make_layer


def vllm_bf16(shape: Any):
    """vLLM's Triton kernel for unquantized experts."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts_op

    def make_layer():
        w13, w2 = _dense(shape)
        return lambda x, topk_weights, topk_ids: fused_experts_op(x, w13, w2, topk_weights, topk_ids)

    return make_layer


def vllm_wna16(shape: Any):
    """vLLM's Triton kernel ``moe_wna16`` for 4-bit weights without zero points."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts_op

    def make_layer():
        packed, scales = [], []
        for N, K in _sizes(shape):
            packed.append(torch.randint(0, 256, (shape.num_experts, N, K // 2), dtype=torch.uint8, device="cuda"))
            scales.append(
                torch.rand(shape.num_experts, N, K // GROUP_SIZE, device="cuda", dtype=torch.bfloat16) / 8 / K**0.5
            )
        return lambda x, topk_weights, topk_ids: fused_experts_op(
            x, *packed, topk_weights, topk_ids, use_int4_w4a16=True, w1_scale=scales[0], w2_scale=scales[1],
            block_shape=[0, GROUP_SIZE],
        )  # fmt: skip

    return make_layer


def vllm_marlin(shape: Any):
    """vLLM's Marlin for 4-bit weights without zero points; random words need no particular order."""
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.scalar_type import scalar_types

    def make_layer():
        packed, scales = [], []
        for N, K in _sizes(shape):
            words = (shape.num_experts, K // 16, N * 2)
            packed.append(torch.randint(-(2**31), 2**31, words, dtype=torch.int32, device="cuda"))
            scales.append(
                torch.rand(shape.num_experts, K // GROUP_SIZE, N, device="cuda", dtype=torch.bfloat16) / 8 / K**0.5
            )
        return lambda x, topk_weights, topk_ids: fused_marlin_moe(
            x, *packed, None, None, *scales, topk_weights, topk_ids, quant_type_id=scalar_types.uint4b8.id
        )

    return make_layer


def _sizes(shape: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    return (2 * shape.intermediate_size, shape.hidden_size), (shape.hidden_size, shape.intermediate_size)


def _dense(shape: Any) -> list[torch.Tensor]:
    return [
        torch.randn(shape.num_experts, N, K, device="cuda", dtype=torch.bfloat16) / K**0.5 for N, K in _sizes(shape)
    ]


PEERS = {
    "torch-bf16": torch_bf16,
    "vllm-bf16": vllm_bf16,
    "vllm-wna16": vllm_wna16,
    "vllm-marlin": vllm_marlin,
}
