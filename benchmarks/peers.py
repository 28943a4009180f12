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
        for N, K in sizes(shape):
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
        for N, K in sizes(shape):
            words = (shape.num_experts, K // 16, N * 2)
            packed.append(torch.randint(-(2**31), 2**31, words, dtype=torch.int32, device="cuda"))
            scales.append(
                torch.rand(shape.num_experts, K // GROUP_SIZE, N, device="cuda", dtype=torch.bfloat16) / 8 / K**0.5
            )
        return lambda x, topk_weights, topk_ids: fused_marlin_moe(
            x, *packed, None, None, *scales, topk_weights, topk_ids, quant_type_id=scalar_types.uint4b8.id
        )

    return make_layer


def humming_4(shape: Any):
    """Humming for 4-bit weights without zero points."""
    return _humming(shape, {4: shape.num_experts})


def humming_mixed(shape: Any):
    """Humming for experts of 2, 3 and 4 bits without zero points, in shares of about 1:1:4."""
    few = max(1, shape.num_experts // 6)
    return _humming(shape, {2: few, 3: few, 4: shape.num_experts - 2 * few})


def _humming(shape: Any, experts_of_width: dict[int, int]):
    """One call of Humming's indexed product for each width, which leaves the rows of routes to other widths alone."""
    from humming.forward import humming_forward
    from humming.ops import process_input
    from humming.schema import HummingWeightSchema
    from humming.transform import prepare_and_transform_humming_tensors
    from humming.tune import get_heuristics_config
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
    from vllm.model_executor.layers.fused_moe.moe_fused_mul_sum import moe_fused_mul_sum

    def make_weights(bits, num_experts, N, K):
        words = torch.randint(-(2**31), 2**31, (num_experts, N, K * bits // 32), dtype=torch.int32, device="cuda")
        scales = torch.rand(num_experts, N, K // GROUP_SIZE, device="cuda", dtype=torch.bfloat16) / 2 ** (bits - 1)
        schema = HummingWeightSchema(b_dtype=f"uint{bits}", weight_scale_group_size=GROUP_SIZE)
        return prepare_and_transform_humming_tensors(
            {"weight": words, "weight_scale": scales / K**0.5}, N, K, schema, num_experts=num_experts,
            torch_dtype=torch.bfloat16,
        )  # fmt: skip

    def make_layer():
        groups, first = [], 0
        for bits, num_experts in experts_of_width.items():
            expert_map = torch.full((shape.num_experts,), -1, dtype=torch.int32, device="cuda")
            expert_map[first : first + num_experts] = torch.arange(num_experts, dtype=torch.int32, device="cuda")
            first += num_experts
            weights = [make_weights(bits, num_experts, N, K) for N, K in sizes(shape)]
            groups.append((num_experts, expert_map if num_experts < shape.num_experts else None, weights))
        locks = torch.zeros(2048, dtype=torch.int32, device="cuda")

        def plan(topk_ids, num_experts, expert_map, weights):
            # For this number of routes alone, because a list for all numbers is compiled whole on the first call.
            routes = -(-topk_ids.numel() * num_experts // shape.num_experts)
            tuned = [get_heuristics_config(config, routes, gemm_type="indexed") for config, _ in weights]
            aligned = {
                block: moe_align_block_size(topk_ids, block, shape.num_experts, expert_map, ignore_invalid_experts=True)
                for block in {tuning["block_shape"][0] for tuning in tuned}
            }
            for (config, tensors), tuning in zip(weights, tuned, strict=True):
                sorted_ids, expert_ids, num_tokens_padded = aligned[tuning["block_shape"][0]]
                yield dict(
                    config=config, **tensors, tuning_config=tuning, compute_config={"gemm_type": "indexed"},
                    sorted_ids=sorted_ids, expert_ids=expert_ids, num_tokens_padded=num_tokens_padded,
                    valid_shape_m=routes, locks=locks,
                )  # fmt: skip

        def layer(x, topk_weights, topk_ids):
            gate_up = x.new_empty(topk_ids.numel(), 2 * shape.intermediate_size)
            routed = x.new_empty(topk_ids.numel(), shape.hidden_size)
            first_calls, second_calls = zip(*(plan(topk_ids, *group) for group in groups), strict=True)
            for call in first_calls:
                humming_forward(inputs=x, outputs=gate_up, top_k=shape.top_k, **call)
            hidden, _, _ = process_input(
                gate_up, activation_type="binary_split", activation_impl="a / (1.f + expf(-a)) * b"
            )
            for call in second_calls:
                humming_forward(inputs=hidden, outputs=routed, top_k=1, **call)
            return moe_fused_mul_sum(routed.view(*topk_ids.shape, -1), topk_weights)

        return layer

    return make_layer


def sizes(shape: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """``[N, K]`` of gate and up together, and of down."""
    return (2 * shape.intermediate_size, shape.hidden_size), (shape.hidden_size, shape.intermediate_size)


def _dense(shape: Any) -> list[torch.Tensor]:
    return [torch.randn(shape.num_experts, N, K, device="cuda", dtype=torch.bfloat16) / K**0.5 for N, K in sizes(shape)]


PEERS = {
    "torch-bf16": torch_bf16,
    "vllm-bf16": vllm_bf16,
    "vllm-wna16": vllm_wna16,
    "vllm-marlin": vllm_marlin,
    "humming-4": humming_4,
    "humming-mixed": humming_mixed,
}
