"""The native kernel on Arm, emulated. On Debian this takes g++-aarch64-linux-gnu and qemu-user."""

from __future__ import annotations

import shutil

import pytest
import torch

from alphaq_vllm import native_build as build

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
pytestmark = pytest.mark.skipif(not (COMPILER and EMULATOR), reason="no cross compiler or no emulator for Arm")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUICK = [
    "group-32-all-widths-torch.float32-neon_dotprod",
    "100-tokens-all-widths-torch.bfloat16-neon_dotprod",
    "no-gate-all-widths-torch.float32-neon_dotprod",
]


@pytest.fixture(scope="module")
def driver(request, make_driver, tmp_path_factory):
    options = build.instruction_sets("aarch64")[request.param]
    command = [COMPILER, "-O3", "-static", *options]
    return make_driver(tmp_path_factory.mktemp(request.param), command, [EMULATOR, "-cpu", "max"])


@pytest.mark.parametrize("driver", build.instruction_sets("aarch64"), indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(case, dtype, driver, make_problem, assert_close):
    problem = make_problem(case, dtype)
    assert_close(driver(problem), problem.expected, dtype)
    if problem.x.shape[0] > 1:
        assert torch.equal(driver(problem, threads=3), driver(problem))
