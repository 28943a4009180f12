"""Experts on several ranks: which rank holds what, and that the ranks together compute what one would."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.fused_moe import all2all_utils
from vllm.model_executor.layers.fused_moe.prepare_finalize import naive_dp_ep
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

from alphaq_vllm.format import matrix_tensors
from alphaq_vllm.plugin.moe import SUFFIXES
from tests.plugin.layers import TOP_K, build, load, random_routes, run, stored_tensors
from tests.reliability.loading import empty_model, one_rank

NUM_EXPERTS = 10
# Tokens of a rank that has tokens of its own.
OWN = 2


@pytest.fixture(scope="module")
def tensors():
    return stored_tensors(NUM_EXPERTS)


@pytest.fixture(scope="module")
def routed():
    return random_routes(NUM_EXPERTS, TOP_K)


def expert_parallel(size, rank, **options):
    return {"use_ep": True, "ep_size": size, "ep_rank": rank, **options}


def held_ids(placement, size, rank):
    """Global ids of a rank's experts: in blocks whose sizes differ by one at most, or dealt out one by one."""
    ids = list(range(NUM_EXPERTS))
    if placement == "round_robin":
        return ids[rank::size]
    return torch.tensor(ids).tensor_split(size)[rank].tolist()


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_hold_their_experts_alone_and_compute_the_layer_together(placement, size, tensors, routed):
    total = torch.zeros_like(routed[0])
    for rank in range(size):
        layer = load(build(NUM_EXPERTS, expert_parallel(size, rank), placement), tensors)
        ids = held_ids(placement, size, rank)
        assert layer.quant_method.global_ids == ids
        assert [layer.expert_map[e] for e in ids] == list(range(len(ids)))
        stored = sum(t.nbytes for name, t in tensors.items() if int(name.partition(".")[0]) in ids)
        assert sum(parameter.nbytes for parameter in layer.parameters()) == stored
        total += run(layer, *routed)
    expected = run(load(build(NUM_EXPERTS), tensors), *routed)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [2, 3])
def test_tensor_parallel_ranks_compute_the_layer_together(size, tensors, routed):
    ranks = [load(build(NUM_EXPERTS, {"tp_size": size, "tp_rank": r}), tensors) for r in range(size)]
    # Ranks that share columns have the scales of all rows.
    scales = sum(t.nbytes for name, t in tensors.items() if name.endswith("down_proj.weight_scale"))
    stored = sum(t.nbytes for t in tensors.values()) + (size - 1) * scales
    assert sum(parameter.nbytes for layer in ranks for parameter in layer.parameters()) == stored
    expected = run(load(build(NUM_EXPERTS), tensors), *routed)
    torch.testing.assert_close(sum(run(layer, *routed) for layer in ranks), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "seen"), [(2, 32), (3, 64)])
def test_tensor_parallel_ranks_whose_shares_cut_groups_see_smaller_ones(size, seen, routed):
    """192 columns in groups of 64 are shared by 2 ranks as 3 groups of 32 each, by 3 as they are."""
    tensors = stored_tensors(NUM_EXPERTS, group_size=64)
    one = load(build(NUM_EXPERTS, group_size=64), tensors)
    ranks = [load(build(NUM_EXPERTS, {"tp_size": size, "tp_rank": r}, group_size=64), tensors) for r in range(size)]
    for layer in ranks:
        weights = layer.quant_method.weights
        assert (weights.w13.group_size, weights.w2.group_size) == (64, seen)
        # Rows are shared freely, and whole groups take no byte more.
        assert sum(layer.get_parameter(f"w13_{suffix}").nbytes for suffix in SUFFIXES) * size == sum(
            one.get_parameter(f"w13_{suffix}").nbytes for suffix in SUFFIXES
        )
        assert layer.w2_weight_grid.numel() * size == one.w2_weight_grid.numel() * 64 // seen
        assert torch.equal(layer.w2_weight_scale, one.w2_weight_scale)
    expected = run(one, *routed)
    torch.testing.assert_close(sum(run(layer, *routed) for layer in ranks), expected, rtol=1e-4, atol=1e-4)


class Exchange:
    """In place of vLLM's group of ranks: gives a rank the tokens of all, and keeps its part of the sum for them."""

    device_communicator = SimpleNamespace(all2all_manager=SimpleNamespace(world_size=4))

    def __init__(self, tokens):
        self.tokens, self.parts = tokens, []

    def dispatch(self, x, topk_weights, topk_ids, is_sequence_parallel, extra_tensors=None):
        assert extra_tensors is None
        return self.tokens

    def allocate_combine_input(self, *arguments, **options):
        return None

    def combine(self, part, is_sequence_parallel):
        self.parts.append(part.clone())
        return part[:OWN]

    def combine_into_output(self, part, output, is_sequence_parallel):
        output.copy_(self.combine(part, is_sequence_parallel))


@pytest.fixture
def exchange(monkeypatch):
    """``exchange(tokens)``: vLLM's groups are such an ``Exchange``."""

    def replace(tokens):
        group = Exchange(tokens)
        for module in (all2all_utils, naive_dp_ep):
            monkeypatch.setattr(module, "get_ep_group", lambda: group)
        return group

    # Where vLLM 0.27 has the output of experts; its worker for CPUs does the same.
    if not torch.accelerator.is_available():
        monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    init_workspace_manager(torch.device("cpu"))
    yield replace
    reset_workspace_manager()


@pytest.mark.parametrize("sp_size", [1, 2])
def test_ranks_with_tokens_of_their_own_compute_the_layer_together(sp_size, tensors, routed, exchange):
    """vLLM's modular kernel gathers the tokens of all ranks; each rank adds its experts' part; it scatters the sum."""
    group = exchange(routed)
    own = [tensor[:OWN] for tensor in routed]
    for rank in range(4):
        layer = load(build(NUM_EXPERTS, expert_parallel(4, rank, dp_size=2, sp_size=sp_size)), tensors)
        # Else vLLM's runner would exchange tokens too.
        assert layer.quant_method.supports_internal_mk
        output = run(layer, *own)
        assert torch.equal(output, group.parts[rank][:OWN])
    expected = run(load(build(NUM_EXPERTS), tensors), *routed)
    torch.testing.assert_close(sum(group.parts), expected, rtol=1e-4, atol=1e-4)


def test_router_weights_on_the_input_are_applied_once(tensors, routed, exchange):
    x, weights, ids = routed[0], routed[1][:, :1], routed[2][:, :1]
    group = exchange((x * weights, weights, ids))
    layer = load(build(NUM_EXPERTS, expert_parallel(1, 0, dp_size=2)), tensors)
    one = load(build(NUM_EXPERTS), tensors)
    for built in (layer, one):
        built.apply_router_weight_on_input = True
    run(layer, x[:OWN], weights[:OWN], ids[:OWN])
    torch.testing.assert_close(group.parts[0], run(one, x, weights, ids), rtol=1e-4, atol=1e-4)


def test_pipeline_stage_allocates_its_own_layers_alone(mixed_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("vllm.distributed.utils.get_pp_indices", lambda layers, rank, size: (1, 2))
    with one_rank(tmp_path):
        layers = empty_model(mixed_checkpoint, dtype="float32").model.layers
    assert [isinstance(layer, PPMissingLayer) for layer in layers] == [True, False, True]
    assert not list(layers[0].parameters()) and not list(layers[2].parameters())
    experts = layers[1].mlp.experts.routed_experts
    method, stems = experts.quant_method, {"w1": "w13", "w3": "w13", "w2": "w2"}
    stored = sum(
        spec.nbytes
        for shard, bits in method.num_bits.items()
        for width in bits
        for spec in matrix_tensors(*method.shapes[stems[shard]], width, method.group_size).values()
    )
    assert sum(parameter.nbytes for parameter in experts.parameters()) == stored
