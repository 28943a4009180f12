"""Experts without a gate in vLLM: Nemotron's layers, and what vLLM's activations are here."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.activation import SwigluStepAndMul
from vllm.model_executor.layers.fused_moe import config as vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation

from alphaq_vllm import packing
from alphaq_vllm.format import GRID, PACKED, SCALE
from alphaq_vllm.plugin.modular import MixedExperts
from alphaq_vllm.plugin.support import PLAIN, gate_of
from tests.plugin.layers import (
    HIDDEN,
    INTERMEDIATE,
    MODULE,
    TOP_K,
    UNGATED,
    build,
    load,
    random_routes,
    run,
    stored_tensors,
    widths,
)

NUM_EXPERTS = 6


@pytest.fixture(autouse=True)
def accepted_on_cpus(monkeypatch):
    """vLLM refuses layers without a gate on CPUs, where its own kernels do not have them."""
    platform = SimpleNamespace(is_cuda_alike=lambda: True, is_xpu=lambda: False)
    monkeypatch.setattr(vllm_config, "current_platform", platform)


def build_ungated(parallel=None, placement="linear", **options):
    options = {"projections": UNGATED, "activation": MoEActivation.RELU2_NO_MUL, **options}
    return build(NUM_EXPERTS, parallel, placement, **options)


@pytest.fixture(scope="module")
def tensors():
    return stored_tensors(NUM_EXPERTS, UNGATED)


@pytest.fixture(scope="module")
def routed():
    return random_routes(NUM_EXPERTS, TOP_K)


def expected_output(tensors, x, topk_weights, topk_ids):
    """By the definition, in float64."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for expert in range(NUM_EXPERTS):
        up, down = (
            packing.dequantize(
                *(tensors[f"{expert}.{name}.{suffix}"] for suffix in (PACKED, SCALE, GRID)), bits[expert]
            ).double()
            for name, bits in widths(NUM_EXPERTS, UNGATED).items()
        )
        tokens, slots = torch.where(topk_ids == expert)
        hidden = (x[tokens].double() @ up.T).relu().square()
        out.index_add_(0, tokens, hidden @ down.T * topk_weights[tokens, slots, None])
    return out


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param([{}], id="one-rank"),
        pytest.param([{"tp_size": 2, "tp_rank": rank} for rank in range(2)], id="tensor-parallel"),
        pytest.param([{"use_ep": True, "ep_size": 3, "ep_rank": rank} for rank in range(3)], id="expert-parallel"),
    ],
)
def test_ranks_compute_the_layer_together(ranks, tensors, routed):
    layers = [load(build_ungated(rank), tensors) for rank in ranks]
    # No room is made for gates. Ranks that share columns have the scales of all rows.
    shared = sum(t.nbytes for name, t in tensors.items() if name.endswith("down_proj.weight_scale"))
    copies = sum(layer.quant_method.tp_size > 1 for layer in layers) or 1
    stored = sum(t.nbytes for t in tensors.values()) + (copies - 1) * shared
    assert sum(p.nbytes for layer in layers for p in layer.parameters()) == stored
    total = sum(run(layer, *routed) for layer in layers)
    torch.testing.assert_close(total.double(), expected_output(tensors, *routed), rtol=1e-4, atol=1e-4)


def test_a_missing_tensor_is_named(tensors):
    rest = {name: tensor for name, tensor in tensors.items() if name != "3.up_proj.weight_scale"}
    with pytest.raises(ValueError, match=rf"{MODULE}.3.up_proj.weight_scale: expected in the checkpoint, got nothing"):
        load(build_ungated(), rest)


def test_the_bit_map_has_gates_where_the_model_has(tensors):
    with pytest.raises(ValueError, match=r"expected the bit map of experts with a gate, .* got one without"):
        build(NUM_EXPERTS, projections=UNGATED)
    with pytest.raises(ValueError, match=r"expected the bit map of experts without a gate, .* got one with: config"):
        build(NUM_EXPERTS, activation=MoEActivation.RELU2_NO_MUL)


def test_the_modular_kernel_is_told_the_rows_that_there_are():
    rows = {}
    for layer in (build_ungated(), build(NUM_EXPERTS)):
        experts = MixedExperts(layer.moe_config, lambda *_: None)
        size = experts.moe_problem_size(torch.empty(5, HIDDEN), [0] * 6, [0] * 6, torch.empty(5, TOP_K))
        rows[layer.moe_config.activation.is_gated] = size
    assert rows == {
        False: (NUM_EXPERTS, 5, INTERMEDIATE, HIDDEN, TOP_K),
        True: (NUM_EXPERTS, 5, 2 * INTERMEDIATE, HIDDEN, TOP_K),
    }


def products(gate):
    """Gate and up, of any size, or up alone."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 32, generator=generator) * 8 for _ in range(2 if gate else 1)]


# Older versions have fewer.
@pytest.mark.parametrize("activation", [a for a in MoEActivation if a.value in PLAIN], ids=lambda a: a.value)
def test_activations_are_vllms(activation):
    moe = build(
        NUM_EXPERTS, activation=activation, projections=UNGATED if not activation.is_gated else ("gate_proj", *UNGATED)
    ).moe_config
    given = products(activation.is_gated)
    expected = apply_moe_activation(activation, torch.empty(64, 32), torch.cat(given, 1))
    torch.testing.assert_close(gate_of(moe, MODULE).apply(*given), expected, rtol=1e-5, atol=1e-5)


def test_swiglustep_is_vllms():
    moe = build(NUM_EXPERTS, activation=MoEActivation.SWIGLUSTEP).moe_config
    given = products(True)
    expected = SwigluStepAndMul.forward_native(SimpleNamespace(limit=7.0), torch.cat(given, 1))
    assert expected.abs().max() == 49
    torch.testing.assert_close(gate_of(moe, MODULE).apply(*given), expected)


def test_swigluoai_that_does_not_alternate_is_that_of_gpt_oss():
    options = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0}
    moe = build(NUM_EXPERTS, activation=MoEActivation.SWIGLUOAI_UNINTERLEAVE, **options).moe_config
    gate, up = products(True)
    limited = gate.clamp(max=7)
    expected = limited * (1.702 * limited).sigmoid() * (up.clamp(-7, 7) + 1)
    torch.testing.assert_close(gate_of(moe, MODULE).apply(gate, up), expected)
