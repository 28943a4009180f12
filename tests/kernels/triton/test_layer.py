"""The Triton path: in the interpreter, and on a GPU if there is one."""

from __future__ import annotations

import pytest
import torch

from alphaq_vllm.kernels import fused_moe
from alphaq_vllm.kernels.triton import devices, layer
from alphaq_vllm.kernels.triton.blocks import MAX_DIRECT_ROUTES

# Every width, every way to make blocks, and what emulated GPUs are not asked.
QUICK = {
    "group-32-all-widths-torch.float16",
    "one-expert-only-torch.bfloat16",
    "all-skipped-torch.float16",
    "no-token-torch.float16",
    "130-tokens-foreign-torch.bfloat16",
    "clamped-swiglu-and-bias-torch.float16",
    "gelu-torch.bfloat16",
    "weight-on-input-torch.float16",
    "swiglustep-torch.bfloat16",
    "no-gate-gelu_tanh-torch.bfloat16",
    "no-gate-bias-and-weight-on-input-torch.float16",
    "no-gate-100-tokens-padding-torch.float16",
}


def has_many_routes(problem):
    return problem.routing.topk_ids.numel() > MAX_DIRECT_ROUTES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matches_reference_in_interpreter(case, dtype, make_problem, assert_close, interpreter):
    problem = make_problem(case, dtype).to("cpu")
    actual = interpreter.submit(layer.fused_moe, *problem.inputs).result()
    assert_close(actual, problem.expected, dtype, has_many_routes(problem))


def test_refuses_float32(make_problem, default_case):
    problem = make_problem(default_case, torch.float32)
    with pytest.raises(TypeError, match=r"got torch.float32: use --dtype bfloat16"):
        layer.fused_moe(*problem.inputs)


@pytest.mark.parametrize("name", ["group-64", "width-8", "group-128-many-tokens"])
def test_deals_columns_in_fours_where_registers_feed_the_matrix_unit(
    name, cases, make_problem, assert_close, interpreter, monkeypatch
):
    monkeypatch.setattr(devices, "device_of", lambda _: devices.Device(4, 8))
    problem = make_problem(cases[name], torch.bfloat16).to("cpu")
    patch = "import alphaq_vllm.kernels.triton.devices as d; d.device_of = lambda _, device=d.Device(4, {}): device"
    interpreter.submit(exec, patch.format(8)).result()
    try:
        actual = interpreter.submit(layer.fused_moe, *problem.inputs).result()
    finally:
        interpreter.submit(exec, patch.format(9)).result()
    assert_close(actual, problem.expected, torch.bfloat16)


def test_takes_tokens_in_passes_that_fit_the_workspace(cases, make_problem, assert_close, interpreter):
    problem = make_problem(cases["300-tokens"], torch.float16).to("cpu")
    patch = "import alphaq_vllm.kernels.triton.layer as m; m.MAX_WORKSPACE = {}"
    interpreter.submit(exec, patch.format(1)).result()
    try:
        assert interpreter.submit(layer.tokens_per_pass, 2, problem.weights.w13, 2).result() == 256
        actual = interpreter.submit(layer.fused_moe, *problem.inputs).result()
    finally:
        interpreter.submit(exec, patch.format(2**29)).result()
    assert_close(actual, problem.expected, torch.float16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpu_matches_reference_and_itself(case, dtype, make_problem, assert_close, poisoned_empty):
    problem = make_problem(case, dtype).to("cuda")
    first, second = (fused_moe(*problem.inputs) for _ in range(2))
    assert_close(first, problem.expected, dtype, has_many_routes(problem))
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_replays_in_a_cuda_graph_with_other_routes(make_problem, default_case):
    problem = make_problem(default_case, torch.bfloat16).to("cuda")
    topk_ids = problem.routing.topk_ids
    fused_moe(*problem.inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused_moe(*problem.inputs)
    topk_ids.copy_(topk_ids.flip(0))
    topk_ids[0] = -1
    expected = fused_moe(*problem.inputs)
    graph.replay()
    assert torch.equal(out, expected)
