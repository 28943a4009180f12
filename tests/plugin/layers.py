"""Layers of routed experts as vLLM builds them on one of several ranks, in this process."""

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

from alphaq_vllm.format import AlphaQSpec
from alphaq_vllm.plugin.config import AlphaQConfig
from offline.quantizers.quantize import quantize

MODULE = "model.layers.0.mlp.experts"
HIDDEN, INTERMEDIATE, TOP_K, GROUP_SIZE = 128, 192, 3, 32
ONE_RANK = {
    "tp_size": 1, "tp_rank": 0, "ep_size": 1, "ep_rank": 0, "pcp_size": 1, "pcp_rank": 0, "dp_size": 1, "dp_rank": 0,
    "sp_size": 1, "use_ep": False, "all2all_backend": "allgather_reducescatter", "enable_eplb": False,
}  # fmt: skip


GATED, UNGATED = ("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj")


def widths(num_experts, projections=GATED):
    """Every width, the matrices of one expert differing."""
    return {name: tuple(1 + (3 * e + i) % 8 for e in range(num_experts)) for i, name in enumerate(projections)}


def make_config(num_experts, projections=GATED, group_size=GROUP_SIZE):
    return AlphaQConfig(AlphaQSpec(group_size, {MODULE: widths(num_experts, projections)}))


def build(num_experts, parallel=None, placement="linear", projections=GATED, group_size=GROUP_SIZE, **options):
    """The layer on one rank; parallel: what differs from ``ONE_RANK``; projections: of the bit map; options: of vLLM's
    ``FusedMoEConfig``.
    """
    parallel = FusedMoEParallelConfig(**{**ONE_RANK, **(parallel or {})})
    with set_current_vllm_config(VllmConfig()):
        manager = ExpertMapManager(
            max_num_batched_tokens=64,
            top_k=TOP_K,
            global_num_experts=num_experts,
            num_redundant_experts=0,
            # vLLM deals experts out one by one in models with several groups only.
            num_expert_group=2,
            moe_parallel_config=parallel,
            placement_strategy=placement,
            enable_eplb=False,
        )
        arguments = {
            "num_experts": num_experts,
            "experts_per_token": TOP_K,
            "hidden_dim": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_local_experts": manager.local_num_experts,
            "num_logical_experts": num_experts,
            "activation": MoEActivation.SILU,
            "device": "cpu",
            "routing_method": RoutingMethodType.Renormalize,
            "moe_parallel_config": parallel,
            # What vLLM serves on every device; what is computed with is up to the tokens.
            "in_dtype": torch.bfloat16,
        }
        moe = FusedMoEConfig(**{**arguments, **options})
        # As vLLM's NemotronH names them.
        names = () if moe.activation.is_gated else ("up_proj", "down_proj", None)
        config = make_config(num_experts, projections, group_size)
        return RoutedExperts(MODULE, torch.float32, moe, config, manager, *names)


def stored_tensors(num_experts, projections=GATED, group_size=GROUP_SIZE):
    """The checkpoint's tensors of the layer, by name below the module."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for projection, bits in widths(num_experts, projections).items():
        shape = (HIDDEN, INTERMEDIATE) if projection == "down_proj" else (INTERMEDIATE, HIDDEN)
        for e, num_bits in enumerate(bits):
            weight = torch.randn(shape, generator=generator) / 8
            tensors |= quantize(weight, num_bits, group_size, "rtn").tensors(f"{e}.{projection}")
    return tensors


def load(layer, tensors):
    """Load the layer as vLLM's loader does."""
    list(layer.load_weights(tensors.items()))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def run(layer, x, topk_weights, topk_ids):
    """What the layer computes before vLLM sums over ranks."""
    return layer.forward_modular(x, topk_weights, topk_ids)


def random_routes(num_experts, top_k):
    """33 tokens and their routes, some of them padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(33, num_experts, generator=generator).argsort(1)[:, :top_k].int()
    ids[5:8] = -1
    return torch.randn(33, HIDDEN, generator=generator), torch.rand(33, top_k, generator=generator), ids
