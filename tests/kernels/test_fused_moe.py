"""``fused_moe`` on CPU tensors, and what holds on every device: the operator, its checks, its fake."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from alphaq_vllm.kernels import Gate, PackedExperts, fused_moe, repack_
from alphaq_vllm.kernels.cpu import padded_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_moe_cpu_matches_reference(case, dtype, make_problem, assert_close, poisoned_empty):
    problem = make_problem(case, dtype)
    assert_close(fused_moe(*problem.inputs, **problem.options), problem.expected, dtype)


def test_fused_moe_cpu_repeats_to_the_bit(default_case, make_problem):
    problem = make_problem(default_case, torch.bfloat16)
    first, second = (fused_moe(*problem.inputs, **problem.options) for _ in range(2))
    assert torch.equal(first, second)


def test_fused_moe_cpu_dequantizes_only_experts_with_tokens(default_case, make_problem, monkeypatch):
    problem = make_problem(default_case, torch.float32)
    used = []
    matrix = PackedExperts.matrix
    monkeypatch.setattr(
        PackedExperts, "matrix", lambda self, expert, *args: (used.append(expert), matrix(self, expert, *args))[1]
    )
    fused_moe(*problem.inputs, **problem.options)
    assert set(used) == set(problem.inputs[-1].flatten().tolist())
    assert 0 not in used


def test_fused_moe_cpu_multiplies_few_shapes(default_case, make_problem, monkeypatch):
    """oneDNN keeps memory for each."""
    sizes = set()
    pad = torch.nn.functional.pad
    monkeypatch.setattr(torch.nn.functional, "pad", lambda *args: (padded := pad(*args), sizes.add(len(padded)))[0])
    for num_tokens in range(100, 200):
        case = dataclasses.replace(default_case, num_tokens=num_tokens, routing="one expert", top_k=1)
        problem = make_problem(case, torch.bfloat16)
        assert len(fused_moe(*problem.inputs, **problem.options)) == num_tokens
    assert len(sizes) < 15


def test_padded_rows_are_few_and_hardly_more():
    padded = {n: padded_rows(n) for n in range(1, 2**15)}
    assert all(n <= rows <= n * 9 / 8 for n, rows in padded.items())
    assert len(set(padded.values())) < 120


def test_fused_moe_takes_x_that_is_not_contiguous(default_case, make_problem, assert_close):
    problem = make_problem(default_case, torch.float32)
    x, *rest = problem.inputs
    strided = torch.stack((x, x), -1)[..., 0]
    out = fused_moe(strided, *rest, **problem.options)
    assert out.is_contiguous()
    assert_close(out, problem.expected, torch.float32)


def test_fused_moe_compiles_as_one_opaque_operator(default_case, make_problem):
    """One graph for every number of tokens, with experts that are put together from their tensors inside it."""
    problem = make_problem(default_case, torch.float32)
    x, w13, w2, topk_weights, topk_ids = problem.inputs

    def layer(x, packed, topk_weights, topk_ids):
        rebuilt = PackedExperts(packed, *w13.tensors[1:], w13.group_size, w13.widths)
        return fused_moe(2 * x, rebuilt, w2, topk_weights, topk_ids) + 1

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for num_tokens in (5, 3, 2):
        tokens = [t[:num_tokens].clone() for t in (x, topk_weights, topk_ids)]
        for t in tokens:
            torch._dynamo.mark_dynamic(t, 0)
        args = (tokens[0], w13.packed, *tokens[1:])
        assert torch.equal(compiled(*args), layer(*args))
    assert counter.frame_count == 1
    assert torch.ops.alphaq.fused_moe in [node.target for node in counter.graphs[0].graph.nodes]


def test_fused_moe_passes_opcheck(default_case, make_problem, monkeypatch):
    problem = make_problem(default_case, torch.bfloat16)
    calls = []
    monkeypatch.setattr(torch.ops.alphaq, "fused_moe", lambda *args: calls.append(args))
    fused_moe(*problem.inputs, **problem.options)
    monkeypatch.undo()
    torch.library.opcheck(torch.ops.alphaq.fused_moe.default, calls[0])


def wrong(problem, **changes):
    names = ("x", "w13", "w2", "topk_weights", "topk_ids")
    return fused_moe(**dict(zip(names, problem.inputs, strict=True)) | problem.options | changes)


def test_fused_moe_refuses_what_it_cannot_compute(default_case, make_problem):
    problem = make_problem(default_case, torch.float32)
    x, w13, w2, topk_weights, topk_ids = problem.inputs
    with pytest.raises(TypeError, match=r"x: expected one of .*, got torch.float64"):
        wrong(problem, x=x.double())
    with pytest.raises(ValueError, match=r"x: expected shape \[num_tokens, 96\], got \[5, 95\]"):
        wrong(problem, x=x[:, 1:])
    with pytest.raises(ValueError, match="w13, w2: expected 2 and 1 projections per expert, got 1 and 2"):
        wrong(problem, w13=w2, w2=w13)
    with pytest.raises(ValueError, match=r"w2: expected 4 experts \[96, 160\] to match w13"):
        wrong(problem, w2=dataclasses.replace(w2, scales=w2.scales[:, :, :-1]))
    with pytest.raises(TypeError, match=r"got torch.int32 and torch.float16"):
        wrong(problem, topk_weights=topk_weights.half())
    with pytest.raises(ValueError, match=r"expected two shapes \[5, top_k\], got \[4, 2\] and \[4, 2\]"):
        wrong(problem, topk_ids=topk_ids[1:], topk_weights=topk_weights[1:])
    with pytest.raises(ValueError, match=r"activation: expected one of .*'silu', 'gelu'.*, got 'relu2'"):
        wrong(problem, gate=Gate("relu2"))
    with pytest.raises(ValueError, match=r"w2_bias: expected a contiguous tensor \[4, 96\], got \[4, 1, 96\]"):
        wrong(problem, w2_bias=torch.zeros(4, 1, 96))
    with pytest.raises(ValueError, match="expected the order of the checkpoint on cpu, got tiled=True and tiled=False"):
        wrong(problem, w13=repack_(w13))
    with pytest.raises(ValueError, match="apply_router_weight_on_input: expected top_k=1, got 2"):
        wrong(problem, apply_router_weight_on_input=True)
