"""What holds of ``fused_moe`` on every device: the operator, its checks, its fake."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from alphaq_vllm.kernels import Gate, MoEWeights, PackedExperts, Routing, fused_moe, repack_


def test_fused_moe_takes_x_that_is_not_contiguous(default_case, make_problem, assert_close):
    problem = make_problem(default_case, torch.float32)
    strided = torch.stack((problem.x, problem.x), -1)[..., 0]
    out = fused_moe(strided, problem.weights, problem.routing)
    assert out.is_contiguous()
    assert_close(out, problem.expected, torch.float32)


def test_fused_moe_compiles_as_one_opaque_operator(default_case, make_problem):
    """One graph for every number of tokens, with experts that are put together from their tensors inside it."""
    problem = make_problem(default_case, torch.float32)
    w13, routing = problem.weights.w13, problem.routing

    def layer(x, packed, topk_weights, topk_ids):
        rebuilt = PackedExperts(packed, *w13.tensors[1:], w13.group_size, w13.widths)
        weights = MoEWeights(rebuilt, problem.weights.w2)
        return fused_moe(2 * x, weights, Routing(topk_weights, topk_ids)) + 1

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for num_tokens in (5, 3, 2):
        tokens = [t[:num_tokens].clone() for t in (problem.x, routing.topk_weights, routing.topk_ids)]
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
    fused_moe(*problem.inputs)
    monkeypatch.undo()
    torch.library.opcheck(torch.ops.alphaq.fused_moe.default, calls[0])


def test_fused_moe_refuses_what_it_cannot_compute(default_case, make_problem):
    x, weights, routing = make_problem(default_case, torch.float32).inputs
    with pytest.raises(TypeError, match=r"x: expected one of .*, got torch.float64"):
        fused_moe(x.double(), weights, routing)
    with pytest.raises(ValueError, match=r"x: expected shape \[num_tokens, 96\], got \[5, 95\]"):
        fused_moe(x[:, 1:], weights, routing)
    with pytest.raises(TypeError, match=r"got torch.int32 and torch.float16"):
        fused_moe(x, weights, replace(routing, topk_weights=routing.topk_weights.half()))
    with pytest.raises(ValueError, match=r"expected two shapes \[5, top_k\], got \[4, 2\] and \[4, 2\]"):
        fused_moe(x, weights, routing.of_tokens(slice(1, None)))
    with pytest.raises(ValueError, match="apply_router_weight_on_input: expected top_k=1, got 2"):
        fused_moe(x, weights, replace(routing, apply_router_weight_on_input=True))


def test_weights_refuse_what_does_not_fit(default_case, make_problem):
    weights = make_problem(default_case, torch.float32).weights
    w13, w2 = weights.w13, weights.w2
    with pytest.raises(ValueError, match=r"w13, w2: expected 2 .* and 1 projections per expert, got 1 and 2"):
        replace(weights, w13=w2, w2=w13)
    with pytest.raises(ValueError, match=r"w2: expected 4 experts \[96, 160\] to match w13"):
        replace(weights, w2=replace(w2, scales=w2.scales[:, :, :-1]))
    with pytest.raises(ValueError, match=r"activation: expected one of .*'silu', 'gelu'.*, got 'situ'"):
        replace(weights, gate=Gate("situ"))
    with pytest.raises(ValueError, match="a gate and a limit for swiglustep, got gated=True and limit=None"):
        replace(weights, gate=Gate("swiglustep"))
    with pytest.raises(ValueError, match=r"w2_bias: expected a contiguous tensor \[4, 96\], got \[4, 1, 96\]"):
        replace(weights, w2_bias=torch.zeros(4, 1, 96))
    with pytest.raises(ValueError, match=r"expected one order out of .* on cpu, .*, got 'gpu' and 'checkpoint'"):
        replace(weights, w13=repack_(w13))


def test_weights_without_a_gate_refuse_what_does_not_fit(cases, make_problem):
    weights = make_problem(cases["no-gate-bias-and-weight-on-input"], torch.float32).weights
    with pytest.raises(ValueError, match=r"w13_bias: expected a contiguous tensor \[4, 1, 160\], got \[4, 2, 160\]"):
        replace(weights, w13_bias=torch.zeros(4, 2, 160))
    with pytest.raises(ValueError, match=r"a gate and a limit for swiglustep, got gated=False and limit=7\.0"):
        replace(weights, gate=Gate("swiglustep", 7.0))
    with pytest.raises(ValueError, match="no limit, alpha or beta for experts without a gate"):
        replace(weights, gate=Gate("silu", 7.0))
