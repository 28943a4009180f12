"""The Triton path as it is compiled for each generation of NVIDIA GPUs, run by ``tests.emulator``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from alphaq_vllm.kernels import devices, moe_triton
from alphaq_vllm.kernels.blocks import MAX_DIRECT_ROUTES
from tests.emulator import driver
from tests.emulator.driver import emulated
from tests.emulator.memory import MemoryFault

# Compute capabilities that differ in matrix instructions or tiles.
CAPABILITIES = [80, 90, 100, 120]
# What generation 9 runs all of, the others run these of; `make test-long` all.
SHORT = {
    *("width-3", "width-8", "group-64", "group-128-many-tokens", "300-tokens", "foreign-experts", "no-token"),
    *("100-tokens-all-widths", "300-tokens-group-64"),
}


@pytest.fixture
def run_compiled(monkeypatch):
    """``fused_moe_triton`` on an emulated GPU."""

    def run(problem, sm: int) -> torch.Tensor:
        device = devices.Device(4, sm // 10, overlap=sm >= 90, ptx=True)
        monkeypatch.setattr(devices, "device_of", lambda _: device)
        problem = problem.to("cpu")
        with emulated(sm):
            return moe_triton.fused_moe_triton(*problem.inputs, **problem.options)

    return run


def matches_reference(run_compiled, problem, dtype, sm, assert_close):
    many_routes = problem.inputs[-1].numel() > MAX_DIRECT_ROUTES
    assert_close(run_compiled(problem, sm), problem.expected, dtype, many_routes)


@pytest.mark.parametrize("sm", CAPABILITIES)
def test_compiled_kernels_match_reference(case, sm, run_compiled, make_problem, assert_close, poisoned_empty):
    if sm != 90 and case.name not in SHORT:
        pytest.skip("make test-long runs it")
    problem = make_problem(case, torch.bfloat16)
    matches_reference(run_compiled, problem, torch.bfloat16, sm, assert_close)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sm", [*CAPABILITIES, 89])
def test_compiled_kernels_match_reference_in_every_case(
    case, sm, dtype, run_compiled, make_problem, assert_close, poisoned_empty
):
    matches_reference(run_compiled, make_problem(case, dtype), dtype, sm, assert_close)


@pytest.mark.parametrize("sm", [80, 90])
def test_compiled_kernels_repeat_to_the_bit(sm, cases, run_compiled, make_problem):
    problem = make_problem(cases["63-tokens"], torch.float16)
    assert torch.equal(run_compiled(problem, sm), run_compiled(problem, sm))


@pytest.mark.parametrize(
    ("sm", "ordering"),
    [
        *((80, o) for o in ("bar.sync", "cp.async.wait_group")),
        *((90, o) for o in ("bar.sync", "cp.async.wait_group", "wgmma.wait_group", "griddepcontrol.wait")),
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
    with pytest.raises(MemoryFault):
        run_compiled(problem, sm)


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
