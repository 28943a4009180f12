"""The Triton path: in the interpreter, and on a GPU if there is one."""

from __future__ import annotations

import pytest
import torch

from alphaq_vllm.kernels import fused_moe
from alphaq_vllm.kernels.triton import devices, layer
from alphaq_vllm.kernels.triton.blocks import MAX_DIRECT_ROUTES
from alphaq_vllm.kernels.triton.tiles import TILES


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


def test_warm_up_meets_every_tile_and_both_ways_to_make_blocks(default_case, make_problem, interpreter):
    problem = make_problem(default_case, torch.float16).to("cpu")
    patch = "import alphaq_vllm.kernels.triton.layer as m; m.{} = {}"
    record = (
        "lambda x, weights, routing: seen.append("
        "(m.choose_tiles(routing.topk_ids.numel(), 4, 9, 4), routing.topk_ids.numel() > 256))"
    )
    interpreter.submit(
        exec, "import builtins, alphaq_vllm.kernels.triton.layer as m\nbuiltins.seen = []; builtins.m = m"
    ).result()
    interpreter.submit(exec, patch.format("original", "m.fused_moe")).result()
    interpreter.submit(exec, patch.format("fused_moe", record)).result()
    try:
        interpreter.submit(layer.warm_up, problem.weights, 2, torch.float16).result()
        seen = interpreter.submit(eval, "seen").result()
    finally:
        interpreter.submit(exec, patch.format("fused_moe", "m.original")).result()
    assert {tiles for tiles, _ in seen} == set(TILES[9])
    assert {is_sorted for _, is_sorted in seen} == {False, True}


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
