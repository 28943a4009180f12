"""What the native kernel does with AMX, its matrix unit computed by other instructions: see matrix_unit.h."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alphaq_vllm import native_build as build

pytestmark = pytest.mark.skipif("avx512_vnni" not in build.supported(), reason="no processor with AVX-512 and VNNI")
QUICK = [
    "group-32-all-widths-torch.float32",
    "100-tokens-all-widths-torch.float16",
    "100-tokens-all-widths-torch.bfloat16",
    "300-tokens-torch.bfloat16",
    "no-gate-100-tokens-padding-torch.float16",
]


@pytest.fixture(scope="module")
def driver(make_driver, tmp_path_factory):
    compiler = build.find_compiler()
    assert compiler
    options = (*build.instruction_sets()["avx512_vnni"], "-include", str(Path(__file__).with_name("matrix_unit.h")))
    return make_driver(tmp_path_factory.mktemp("tiles"), [*compiler, "-O2", *options])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_reference(case, dtype, driver, make_problem, assert_close):
    problem = make_problem(case, dtype)
    # Many tokens of bfloat16 are multiplied with weights that are rounded to it.
    assert_close(driver(problem), problem.expected, dtype)
    if problem.x.shape[0] > 1:
        assert torch.equal(driver(problem, threads=3), driver(problem))
