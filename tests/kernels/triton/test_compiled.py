"""The Triton path as it is compiled for each generation of NVIDIA GPUs, run by ``tests.emulator``."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from alphaq_vllm.kernels import MoEWeights, PackedExperts, Routing
from alphaq_vllm.kernels.triton import devices, layer
from alphaq_vllm.kernels.triton.blocks import (
    MAX_DIRECT_ROUTES,
    direct_blocks_kernel,
    place_routes_kernel,
    rank_routes_kernel,
)
from alphaq_vllm.kernels.triton.elementwise import activate_kernel, sum_routes_kernel
from alphaq_vllm.kernels.triton.gemm import moe_gemm_kernel
from alphaq_vllm.kernels.triton.tiles import TILES, choose_tiles
from tests.emulator import driver
from tests.emulator.driver import emulated
from tests.emulator.memory import MemoryFault

# Compute capabilities that differ in matrix instructions, tiles or shared memory.
CAPABILITIES = [80, 89, 90, 100, 120]
# Those that `make test` runs: each generation's tiles, each dtype, few and many routes.
QUICK = {
    *("one-token-torch.bfloat16-80", "16-tokens-torch.float16-80", "63-tokens-torch.bfloat16-80"),
    *("300-tokens-torch.bfloat16-80", "group-128-many-tokens-torch.bfloat16-90", "padding-torch.float16-90"),
    *("width-8-torch.bfloat16-90", "one-expert-only-torch.bfloat16-90", "300-tokens-torch.float16-90"),
    *("one-token-torch.float16-100", "one-expert-only-torch.bfloat16-100", "100-tokens-padding-torch.bfloat16-100"),
    *("300-tokens-torch.bfloat16-100", "one-token-torch.bfloat16-120", "16-tokens-torch.bfloat16-120"),
    *("one-expert-only-torch.bfloat16-120", "300-tokens-torch.float16-120"),
    # The first product waits for the kernel ahead although it is of one matrix, as down's is.
    *("no-gate-one-token-group-64-torch.bfloat16-90", "no-gate-300-tokens-group-64-torch.bfloat16-90"),
    "no-gate-relu2-torch.float16-80",
}


@pytest.fixture
def run_compiled(monkeypatch):
    """The layer on an emulated GPU."""

    def run(problem, sm: int) -> torch.Tensor:
        device = devices.Device(4, sm // 10, overlap=sm >= 90, ptx=True)
        monkeypatch.setattr(devices, "device_of", lambda _: device)
        problem = problem.to("cpu")
        with emulated(sm):
            return layer.fused_moe(*problem.inputs)

    return run


@pytest.mark.parametrize("sm", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_kernels_match_reference(case, dtype, sm, run_compiled, make_problem, assert_close, poisoned_empty):
    problem = make_problem(case, dtype)
    many_routes = problem.routing.topk_ids.numel() > MAX_DIRECT_ROUTES
    assert_close(run_compiled(problem, sm), problem.expected, dtype, many_routes)


@pytest.mark.parametrize("sm", [pytest.param(80, marks=pytest.mark.kernels), 90])
def test_compiled_kernels_repeat_to_the_bit(sm, cases, run_compiled, make_problem):
    problem = make_problem(cases["63-tokens"], torch.float16)
    assert torch.equal(run_compiled(problem, sm), run_compiled(problem, sm))


@pytest.mark.parametrize("name", ["one-token", "130-tokens-foreign"])
def test_routing_may_begin_anywhere_without_another_compilation(name, cases, run_compiled, make_problem):
    kernels = (direct_blocks_kernel, rank_routes_kernel, place_routes_kernel, activate_kernel, sum_routes_kernel)

    def compiled():
        return sum(len(kernel.device_caches[90][0]) for kernel in kernels if 90 in kernel.device_caches)

    problem = make_problem(cases[name], torch.bfloat16)
    aligned = run_compiled(problem, 90)
    before = compiled()
    given = (problem.routing.topk_weights, problem.routing.topk_ids)
    topk_weights, topk_ids = (t.new_zeros(t.numel() + 1)[1:].view_as(t).copy_(t) for t in given)
    assert topk_weights.data_ptr() % 16 and topk_ids.data_ptr() % 16
    routing = replace(problem.routing, topk_weights=topk_weights, topk_ids=topk_ids)
    moved = replace(problem, routing=routing)
    assert torch.equal(run_compiled(moved, 90), aligned)
    assert compiled() == before


@pytest.mark.parametrize(
    ("sm", "ordering"),
    [
        *((80, o) for o in ("bar.sync", "cp.async.wait_group")),
        *((90, o) for o in ("bar.sync", "cp.async.wait_group", "wgmma.wait_group", "griddepcontrol.wait", "griddep")),
        *((100, o) for o in ("bar.sync", "cp.async.wait_group", "mbarrier.try_wait")),
    ],
)
def test_the_emulator_notices_missing_order(sm, ordering, cases, run_compiled, make_problem, monkeypatch):
    """A kernel that does not wait, or whose warps do not wait for each other, fails, so the real one does wait."""
    parse = driver.parse

    def parse_without(text):
        kernel = parse(text)
        if "moe_gemm_kernel" not in text:
            return kernel
        kept = [i for i in kernel.instructions if not i.opcode.startswith(ordering)]
        assert len(kept) < len(kernel.instructions)
        indices = np.cumsum([0] + [not i.opcode.startswith(ordering) for i in kernel.instructions])
        kernel.labels = {name: int(indices[place]) for name, place in kernel.labels.items()}
        kernel.instructions = kept
        return kernel

    problem = make_problem(cases["group-128-many-tokens"], torch.bfloat16)
    monkeypatch.setattr(driver, "parse", parse_without)
    # Without either instruction that orders kernels, it is the early read itself that shows.
    with pytest.raises(MemoryFault, match="kernel ahead writes" if ordering == "griddep" else None):
        run_compiled(problem, sm)


@pytest.mark.parametrize("sm", [80, 90, 100, 120])
def test_cases_reach_every_tile(cases, sm):
    """All of them do, and so do the quick ones alone."""

    def reached(some):
        return {
            choose_tiles(case.num_tokens * case.top_k, case.num_experts, sm // 10, max(case.widths))
            for case in some
            if case.num_tokens and case.routing != "foreign"
        }

    quick = [cases[name.split("-torch.")[0]] for name in QUICK if name.endswith(f"-{sm}")]
    assert reached(cases.values()) >= set(TILES[sm // 10])
    assert reached(quick) >= set(TILES[sm // 10])


def empty_weights(num_experts: int, N: int, K: int) -> MoEWeights:
    """For launches that are recorded and not run."""
    return MoEWeights(empty_experts(num_experts, 2, N, K), empty_experts(num_experts, 1, K, N), checked=True)


def empty_experts(num_experts: int, projections: int, N: int, K: int) -> PackedExperts:
    matrices = (num_experts, projections)
    scales = torch.empty(*matrices, N, 1, dtype=torch.bfloat16)
    grids = torch.empty(*matrices, N, K // 128, dtype=torch.uint8)
    num_bits = torch.empty(matrices, dtype=torch.int32)
    packed = torch.empty(128, dtype=torch.int32)
    return PackedExperts(packed, scales, grids, num_bits, num_bits.long(), 128, (2, 3, 4), "gpu")


@pytest.mark.parametrize("expert_map", [None, torch.zeros(64, dtype=torch.int32)], ids=["all-experts", "some-experts"])
def test_warm_up_leaves_nothing_to_compile(expert_map, monkeypatch):
    keys = set()

    def record(kernel, *args, grid, warmup, **options):
        *_, bind = kernel.device_caches[90]
        keys.add((kernel.__name__, *map(str, bind(*args, **options)[1:])))

    monkeypatch.setattr(triton.JITFunction, "run", record)
    monkeypatch.setattr(devices, "device_of", lambda _: devices.Device(132, 9, overlap=True, ptx=True))
    weights = empty_weights(8, 1408, 2048)
    with emulated(90):
        layer.warm_up(weights, 4, torch.bfloat16, expert_map)
        warm = set(keys)
        for num_tokens, dtype in product([*range(1, 300), 511, 512, 1000, 5000, 32768], (torch.int32, torch.int64)):
            x, ids = torch.empty(num_tokens, 2048, dtype=torch.bfloat16), torch.empty(num_tokens, 4, dtype=dtype)
            layer.fused_moe(x, weights, Routing(torch.empty(num_tokens, 4), ids, expert_map))
    assert len(warm) > 10
    assert keys == warm


@pytest.mark.parametrize(("num_tokens", "dtype", "split"), [(32, torch.float32, True), (33, torch.bfloat16, False)])
def test_columns_are_split_for_few_routes_only(num_tokens, dtype, split, monkeypatch):
    """Parts of many routes' results would not fit the workspace, however few the experts of a rank are."""
    outputs = []

    def record(kernel, *args, grid, warmup, **options):
        if kernel is moe_gemm_kernel:
            outputs.append(args[2])

    monkeypatch.setattr(triton.JITFunction, "run", record)
    monkeypatch.setattr(devices, "device_of", lambda _: devices.Device(132, 9, overlap=True, ptx=True))
    x, ids = torch.empty(num_tokens, 2048, dtype=torch.bfloat16), torch.zeros(num_tokens, 8, dtype=torch.int32)
    layer.fused_moe(x, empty_weights(1, 512, 2048), Routing(ids.float(), ids))
    assert [(out.dtype, out.shape[0] > 1) for out in outputs] == [(dtype, split)] * 2


@triton.jit
def _copy_kernel(source_ptr, target_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(target_ptr + i, tl.load(source_ptr + i))


def test_the_emulator_refuses_what_is_out_of_bounds():
    source, target = torch.arange(128), torch.empty(128, dtype=torch.int64)
    with emulated(90):
        _copy_kernel[(1,)](source, target, 128)
        assert torch.equal(source, target)
        with pytest.raises(MemoryFault, match="outside of every tensor"):
            _copy_kernel[(1,)](source[:127].clone(), target, 128)
        with pytest.raises(MemoryFault, match="outside of every tensor"):
            _copy_kernel[(1,)](source, target[:127].clone(), 128)
