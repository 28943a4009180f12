"""Layers whose two stems have groups of different size, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from alphaq_vllm.kernels.triton import layer
from tests.kernels.test_group_sizes import with_smaller_groups


@pytest.mark.parametrize(
    ("name", "group_size"),
    [
        pytest.param("group-128", 64, id="sums of groups"),
        pytest.param("40-tokens-group-128", 32, id="several blocks"),
        pytest.param("200-tokens-group-128", 64, id="scaled weights", marks=pytest.mark.kernels),
    ],
)
def test_kernels_compute_the_same_layer(name, group_size, cases, make_problem, assert_close, interpreter):
    problem = with_smaller_groups(make_problem(cases[name], torch.bfloat16), group_size).to("cpu")
    actual = interpreter.submit(layer.fused_moe, *problem.inputs).result()
    assert_close(actual, problem.expected, torch.bfloat16, many_routes=cases[name].num_tokens > 16)
