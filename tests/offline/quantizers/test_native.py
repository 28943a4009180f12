"""The native code computes what torch does, and the same bits with every instruction set."""

import os
import subprocess
import sys

import pytest
import torch

from alphaq_vllm.native_build import QUANTIZERS, load, supported
from offline.quantizers import native
from offline.quantizers.columns import Columns
from offline.quantizers.gptq import feedback, gptq
from offline.quantizers.quantize import quantize
from tests.offline.quantizers.samples import gaussian, restore, student_t5

WIDTHS = (1, 2, 3, 4, 5, 8)


@pytest.fixture
def use(monkeypatch):
    """A function that makes quantizers use an instruction set, or torch for None."""

    def use(instruction_set):
        code = load(QUANTIZERS, instruction_set) if instruction_set else None
        monkeypatch.setattr(native, "library", lambda: code)

    return use


# 21 and 150 rows leave vectors of every width half empty.
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("num_bits", WIDTHS)
def test_grids_have_the_error_of_those_of_torch(num_bits, group_size, use):
    weight = student_t5(21, 640) * gaussian(21, 1, seed=1).exp() + 0.1
    use(None)
    expected = quantize(weight, num_bits, group_size)
    for name in supported():
        use(name)
        found = quantize(weight, num_bits, group_size)
        assert found.mse == pytest.approx(expected.mse, rel=1e-4)
        assert (found.scale == expected.scale).float().mean() > 0.98


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_gptq_has_the_error_of_that_of_torch(num_bits, use):
    inputs = gaussian(400, 256) @ (gaussian(256, 256, seed=1) / 16 + torch.eye(256))
    weight, back = student_t5(150, 256), feedback(inputs, 64)

    def error(quantized):
        return float(((restore(quantized, num_bits) - weight) @ inputs.T).square().mean())

    use(None)
    expected = gptq(weight, back, num_bits, 64)
    for name in supported():
        use(name)
        found = gptq(weight, back, num_bits, 64)
        assert error(found) == pytest.approx(error(expected), rel=0.02)
        assert found.mse == pytest.approx(expected.mse, rel=0.01)


def test_columns_are_rounded_as_by_torch(use, monkeypatch):
    """Grids apart, there is one right answer, but for codes that rounding decides."""
    block, factor = student_t5(64, 77), feedback(gaussian(300, 64), 64).factor
    moved = gaussian(64, 77, seed=3) / 8
    scale, grid = gaussian(77).abs() / 10 + 0.01, torch.arange(77, dtype=torch.uint8) * 3
    results = []
    for name in (None, *supported()):
        use(name)
        codes, errors = torch.empty(64, 77, dtype=torch.uint8), torch.empty(64, 77)
        Columns(codes, scale, grid, 3).round(block, block + moved, factor, errors)
        results.append((codes, errors))
    for codes, errors in results[1:]:
        same = (codes == results[0][0]).all(0)
        assert same.float().mean() > 0.95
        torch.testing.assert_close(errors[:, same], results[0][1][:, same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_all_instruction_sets_compute_the_same_bits(num_bits, use):
    weight, back = student_t5(150, 256), feedback(gaussian(400, 256), 64)
    results = []
    for name in supported():
        use(name)
        both = quantize(weight, num_bits, 64), gptq(weight, back, num_bits, 64)
        results.append([tensor for quantized in both for tensor in quantized.tensors("").values()])
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


def test_without_a_compiler_torch_quantizes_and_one_line_says_so(tiny_model, tmp_path):
    """One line, of several processes."""
    arguments = [str(tiny_model("mixtral")), str(tmp_path / "out"), "--workers", "2"]
    env = {**os.environ, "PATH": "/nowhere", "ALPHAQ_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "offline.convert", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=env, timeout=300)
    (line,) = [line for line in result.stderr.splitlines() if "AlphaQ" in line]
    assert line.startswith("AlphaQ quantizes with torch, many times slower than its native code: no C++ compiler: ")
