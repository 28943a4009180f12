"""The Triton path: in the interpreter, compiled ahead of time for absent GPUs, and on a GPU if there is one."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from alphaq_vllm.kernels import fused_moe
from alphaq_vllm.kernels.moe_gemm import fused_moe_triton
from alphaq_vllm.kernels.tiles import TILES

# Bytes of shared memory that one program may have (CUDA programming guide, table of compute capabilities).
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.fixture(scope="module")
def interpreter():
    set_up = (str(Path(__file__).with_name("interpret.py")), None, "__main__")
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=runpy.run_path, initargs=set_up) as pool:
        assert pool.submit(torch.empty, 1).result().isnan()
        yield pool


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fused_moe_triton_matches_reference_in_interpreter(case, dtype, make_problem, assert_close, interpreter):
    problem = make_problem(case, dtype)
    actual = interpreter.submit(fused_moe_triton, *problem.inputs, **problem.options).result()
    assert_close(actual, problem.expected, dtype)


def test_fused_moe_triton_refuses_float32(make_problem, default_case):
    problem = make_problem(default_case, torch.float32)
    with pytest.raises(TypeError, match=r"got torch.float32: use --dtype bfloat16"):
        fused_moe_triton(*problem.inputs, **problem.options)


def compile_ahead(*cases: str) -> list[dict]:
    script = Path(__file__).with_name("compile_ahead.py")
    output = subprocess.run([sys.executable, script, *cases], check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def test_kernels_compile_without_spills():
    """Every GPU generation, tile, activation dtype and width, though not every combination of them."""
    rows = compile_ahead(
        "80:bf16:16:234",
        "80:fp16:64:234",
        "89:fp16:32:18",
        "90:bf16:16:12348",
        "90:bf16:128:234",
        "100:bf16:128:234",
        "100:fp16:16:567",
    )
    assert {row["sm"] for row in rows} == set(SHARED_MEMORY)
    assert {row.get("block_m") for row in rows} >= {tiles.block_m for tiles in TILES}
    for row in rows:
        assert row["stack"] == 0, row
        assert row["shared"] <= SHARED_MEMORY[row["sm"]], row
        if row["sm"] == 90 and row["kernel"] == "moe_gemm_kernel":
            assert row["wgmma"], row


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fused_moe_gpu_matches_reference_and_itself(case, dtype, make_problem, assert_close, poisoned_empty):
    problem = make_problem(case, dtype).to("cuda")
    first, second = (fused_moe(*problem.inputs, **problem.options) for _ in range(2))
    assert_close(first, problem.expected, dtype)
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_fused_moe_gpu_replays_in_a_cuda_graph_with_other_routes(make_problem, default_case):
    problem = make_problem(default_case, torch.bfloat16).to("cuda")
    topk_ids = problem.inputs[-1]
    fused_moe(*problem.inputs, **problem.options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused_moe(*problem.inputs, **problem.options)
    topk_ids.copy_(topk_ids.flip(0))
    topk_ids[0] = -1
    expected = fused_moe(*problem.inputs, **problem.options)
    graph.replay()
    assert torch.equal(out, expected)
