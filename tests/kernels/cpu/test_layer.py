"""``fused_moe`` on CPU tensors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from alphaq_vllm.kernels import PackedExperts, fused_moe
from alphaq_vllm.kernels.torch_layer import padded_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(case, dtype, make_problem, assert_close, poisoned_empty):
    problem = make_problem(case, dtype)
    assert_close(fused_moe(*problem.inputs), problem.expected, dtype)


def test_repeats_to_the_bit(default_case, make_problem):
    problem = make_problem(default_case, torch.bfloat16)
    first, second = (fused_moe(*problem.inputs) for _ in range(2))
    assert torch.equal(first, second)


def test_dequantizes_only_experts_with_tokens(default_case, make_problem, monkeypatch):
    problem = make_problem(default_case, torch.float32)
    used = []
    matrix = PackedExperts.matrix
    monkeypatch.setattr(
        PackedExperts, "matrix", lambda self, expert, *args: (used.append(expert), matrix(self, expert, *args))[1]
    )
    fused_moe(*problem.inputs)
    assert set(used) == set(problem.routing.topk_ids.flatten().tolist())
    assert 0 not in used


def test_multiplies_few_shapes(default_case, make_problem, monkeypatch):
    """oneDNN keeps memory for each."""
    sizes = set()
    pad = torch.nn.functional.pad
    monkeypatch.setattr(torch.nn.functional, "pad", lambda *args: (padded := pad(*args), sizes.add(len(padded)))[0])
    for num_tokens in range(100, 200):
        case = dataclasses.replace(default_case, num_tokens=num_tokens, routing="one expert", top_k=1)
        problem = make_problem(case, torch.bfloat16)
        assert len(fused_moe(*problem.inputs)) == num_tokens
    assert len(sizes) < 15


def test_padded_rows_are_few_and_hardly_more():
    padded = {n: padded_rows(n) for n in range(1, 2**15)}
    assert all(n <= rows <= n * 9 / 8 for n, rows in padded.items())
    assert len(set(padded.values())) < 120
