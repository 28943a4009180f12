"""The native code computes what torch does, and the same bits with every instruction set."""

import os
import subprocess
import sys

import pytest
import torch

from alphaq_vllm.native_build import QUANTIZERS, load, supported
from offline.quantizers import native
from offline.quantizers.columns import round_group
from offline.quantizers.gptq import feedback, gptq
from offline.quantizers.grids import rtn_grid
from offline.quantizers.groups import encode, normalize, quantize_groups
from offline.quantizers.quantize import pack, quantize, scales_of
from tests.offline.quantizers.samples import gaussian, restore, student_t5

WIDTHS = (1, 2, 3, 4, 5, 8)
# Rows of 256 weights that are hard to store: nothing, all equal, small beside the rest, far from 0, rounded, of two
# values, of heavy tails, subnormal, or as large as can be.
EXTREMES = torch.cat(
    [
        torch.zeros(2, 256),
        gaussian(9, 1).expand(9, 256),
        gaussian(9, 2).repeat_interleave(128, 1) * (torch.arange(256) % 128 > 32),
        gaussian(9, 256) * torch.tensor([1, 1e-3, 1e-2, 10]).repeat_interleave(64),
        100 + gaussian(9, 256),
        1e4 + gaussian(9, 256) * 1e-3,
        gaussian(9, 256).bfloat16().float(),
        gaussian(9, 256).sign(),
        gaussian(9, 256) ** 15,
        torch.full((1, 256), 1e-45),
        gaussian(9, 256) * 1e-42,
        gaussian(9, 256) * 1e-37,
        torch.full((1, 256), 2e38),
        gaussian(9, 256).mul(1e38).clamp(-3.4e38, 3.4e38),
        gaussian(9, 256).sign() * 3e38,
    ]
)
# Ways to find grids: as good as any without a search, too narrow, far from all that can be stored, and none at all.
FOUND = {
    "rtn": rtn_grid,
    "narrow": lambda groups, top: (
        torch.full_like(groups.radius, 0.8 * top),
        torch.full_like(groups.radius, 0.4 * top),
    ),
    "far": lambda groups, top: (torch.full_like(groups.radius, 1e-3), torch.full_like(groups.radius, 50)),
    "infinite": lambda groups, top: (torch.zeros_like(groups.radius), torch.zeros_like(groups.radius)),
    "NaN": lambda groups, top: (torch.full_like(groups.radius, torch.nan), torch.full_like(groups.radius, torch.nan)),
}


@pytest.fixture
def use(monkeypatch):
    """A function that makes quantizers use an instruction set, or torch for None."""

    def use(instruction_set):
        code = load(QUANTIZERS, instruction_set) if instruction_set else None
        monkeypatch.setattr(native, "library", lambda: code)

    return use


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_groups_are_normalized_as_by_torch(group_size, use):
    weight = torch.cat((student_t5(21, 256), EXTREMES))
    use(None)
    expected = normalize(weight, group_size)
    for name in supported():
        use(name)
        found = normalize(weight, group_size)
        assert all(torch.equal(getattr(found, part), getattr(expected, part)) for part in ("x", "center", "radius"))
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.variance, expected.variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("found", FOUND)
@pytest.mark.parametrize("num_bits", range(1, 9))
def test_grids_and_codes_are_stored_as_by_torch(num_bits, found, use):
    """Only grids that are equally good may differ: sums in another order say that one or the other is better."""
    for weight, least in ((student_t5(150, 256), 1), (EXTREMES, 0.9)):
        use(None)
        groups = normalize(weight, 64)
        codes, scales, grid, sse = quantize_groups(groups, num_bits, FOUND[found])
        scale = scales.float().repeat_interleave(groups.per_row, 0)
        for name in supported():
            use(name)
            new_codes, new_scales, new_grid, new_sse = quantize_groups(groups, num_bits, FOUND[found])
            same = (new_grid == grid)[:, 0]
            assert same.float().mean() >= least
            assert torch.equal(new_scales, scales)
            assert torch.equal(new_codes[same], codes[same])
            torch.testing.assert_close(new_sse, sse, rtol=1e-5, atol=0)
            again, errors = encode(weight.view(-1, 64), scale, new_grid, num_bits)
            assert torch.equal(new_codes, again.to(torch.uint8))
            torch.testing.assert_close(errors, encode(weight.view(-1, 64), scale, grid, num_bits)[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_codes_are_packed_as_by_torch(num_bits, use):
    codes = torch.randint(2**num_bits, (300, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    use(None)
    expected = pack(codes, num_bits)
    for name in supported():
        use(name)
        assert torch.equal(pack(codes, num_bits), expected)
        assert torch.equal(pack(codes.T.contiguous().T, num_bits), expected)


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


# Sums in another order say now and then that another grid or code is better, and what comes after follows it.
@pytest.mark.parametrize(
    ("size", "improvements", "least"), [(64, 0, 0.95), (64, 1, 0.85), (32, 3, 0.75), (128, 3, 0.6)]
)
@pytest.mark.parametrize("num_bits", WIDTHS)
def test_columns_are_rounded_as_by_torch(num_bits, size, improvements, least, use):
    inputs = gaussian(300, size) @ (gaussian(size, size, seed=1) / 8 + torch.eye(size))
    weight, back = student_t5(77, size), feedback(inputs, size)
    block, moved = weight.T.contiguous(), gaussian(size, 77, seed=3) / 8
    some = scales_of(weight, num_bits, size), back.factor, back.costs, num_bits, improvements
    use(None)
    expected = round_group(block, moved, *some)
    for name in supported():
        use(name)
        codes, grid, errors = round_group(block, moved, *some)
        same = (grid == expected[1]) & (codes == expected[0]).all(0)
        assert same.float().mean() > least
        torch.testing.assert_close(errors[:, same], expected[2][:, same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_the_best_of_the_grids_around_is_taken(num_bits, use, monkeypatch):
    inputs = gaussian(300, 64) @ (gaussian(64, 64, seed=1) / 8 + torch.eye(64))
    weight, back = student_t5(77, 64), feedback(inputs, 64)
    block, moved = weight.T.contiguous(), gaussian(64, 77, seed=3) / 8
    scales = scales_of(weight, num_bits, 64)

    def loss(reach):
        monkeypatch.setattr("offline.quantizers.columns.REACH", reach)
        errors = round_group(block, moved, scales, back.factor, back.costs, num_bits, 1)[2]
        return (torch.addmm(moved, back.factor, errors).square() * back.costs[:, None]).sum(0)

    for name in (None, *supported()):
        use(name)
        one, some, more = (float(loss(reach).mean()) for reach in (0, 1, 2))
        assert more < some < 0.98 * one


def test_columns_that_became_infinite_are_refused(use):
    block, moved, ones = gaussian(64, 77), torch.zeros(64, 77), torch.ones(64)
    moved[3, 76] = torch.inf
    scales = torch.ones(77, 1, dtype=torch.bfloat16)
    for name in (None, *supported()):
        use(name)
        with pytest.raises(ValueError, match="expected finite values"):
            round_group(block, moved, scales, ones.diag(), ones, 3, 3)


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_all_instruction_sets_compute_the_same_bits(num_bits, use):
    weight, back = student_t5(150, 256), feedback(gaussian(400, 256), 64)
    results = []
    for name in supported():
        use(name)
        everything = (
            quantize(weight, num_bits, 64),
            quantize(EXTREMES, num_bits, 64),
            quantize(EXTREMES, num_bits, 64, "rtn"),
            gptq(weight, back, num_bits, 64),
        )
        tensors = [tensor for quantized in everything for tensor in quantized.tensors("").values()]
        results.append((tensors, [quantized.mse for quantized in everything[:3]]))
    for tensors, errors in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(tensors, results[0][0], strict=True))
        assert errors == results[0][1]


def test_without_a_compiler_torch_quantizes_and_one_line_says_so(tiny_model, tmp_path):
    """One line, of several processes."""
    arguments = [str(tiny_model("mixtral")), str(tmp_path / "out"), "--workers", "2"]
    env = {**os.environ, "PATH": "/nowhere", "ALPHAQ_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "offline.convert", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=env, timeout=300)
    (line,) = [line for line in result.stderr.splitlines() if "AlphaQ" in line]
    assert line.startswith("AlphaQ quantizes with torch, many times slower than its native code: no C++ compiler: ")
