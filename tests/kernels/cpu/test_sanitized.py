"""The native kernel under sanitizers: no access outside of its tensors, nothing undefined, no race of threads."""

from __future__ import annotations

import pytest
import torch

from alphaq_vllm import native_build as build

CASES = ("group-32-all-widths", "100-tokens-padding", "no-gate-100-tokens-padding")
QUICK = [f"{case}-{build.supported()[0]}-address" for case in CASES]
# GCC's check of shifts does not compile for vectors.
CHECKS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize=shift", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}


@pytest.fixture(scope="module")
def driver(request, make_driver, tmp_path_factory):
    instruction_set, check = request.param
    compiler = build.find_compiler()
    assert compiler
    options = (*build.instruction_sets()[instruction_set], *CHECKS[check], "-O1")
    return make_driver(tmp_path_factory.mktemp(check), [*compiler, *options])


SETS = [(name, check) for name in build.supported() for check in CHECKS]


@pytest.mark.parametrize("driver", SETS, indirect=True, ids="-".join)
def test_is_clean(case, driver, make_problem, assert_close):
    for dtype in (torch.float32, torch.bfloat16):
        problem = make_problem(case, dtype)
        assert_close(driver(problem, threads=3), problem.expected, dtype)
