"""Layers whose two stems have groups of different size, as ranks of tensor parallelism see them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from alphaq_vllm.kernels import MoEWeights, fused_moe, prepare_
from alphaq_vllm.ranks import in_smaller_groups


def with_smaller_groups(problem, group_size):
    """The same layer, with down's groups of columns seen as several of ``group_size``."""
    w2 = problem.weights.w2
    w2 = replace(w2, grids=in_smaller_groups(w2.grids, w2.group_size, group_size), group_size=group_size)
    return replace(problem, weights=replace(problem.weights, w2=w2))


@pytest.mark.parametrize("prepare", [False, True], ids=["torch", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "group_size"), [("group-128", 64), ("200-tokens-group-128", 32)])
def test_cpus_compute_the_same_layer(name, group_size, dtype, prepare, cases, make_problem, assert_close):
    problem = with_smaller_groups(make_problem(cases[name], dtype), group_size)
    weights = problem.weights
    if prepare:
        weights = MoEWeights(prepare_(weights.w13), prepare_(weights.w2))
        assert weights.w2.order == "cpu"
    assert_close(fused_moe(problem.x, weights, problem.routing), problem.expected, dtype)
