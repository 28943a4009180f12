"""Hill's alpha against a plain float64 computation, and its bounds."""

import math

import numpy as np
import pytest
import torch

from offline.sensitivity import spectra
from offline.sensitivity.spectra import MAX_ALPHA, MIN_ALPHA, choose_block_size, hill_alpha, relative_noise


def reference_alpha(weight, block_size, tail_fraction=0.1):
    pool = []
    for i in range(0, weight.shape[0] - block_size + 1, block_size):
        for j in range(0, weight.shape[1] - block_size + 1, block_size):
            pool += torch.linalg.svdvals(weight[i : i + block_size, j : j + block_size].double()).square().tolist()
    pool.sort(reverse=True)
    tail = max(10, int(tail_fraction * len(pool)))
    return 1 + tail / sum(math.log(value / pool[tail]) for value in pool[:tail])


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("shapes", "expected"), [([(128, 900)], 128), ([(4096, 127), (256, 256)], 64), ([(32, 32)], 32)]
)
def test_choose_block_size_fits_every_side(shapes, expected):
    assert choose_block_size(shapes) == expected


@pytest.mark.parametrize("shapes", [[], [(31, 128)], [(128, 128), (128, 0)]])
def test_choose_block_size_refuses_what_has_no_block(shapes):
    with pytest.raises(ValueError, match="at least 32"):
        choose_block_size(shapes)


@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((1024, 640), 128), ((520, 300), 64), ((256, 384), 128), ((33, 95), 32), ((128, 128), 128), ((32, 32), 32)],
)
def test_hill_alpha_equals_float64_reference(shape, block_size):
    weight = gaussian(*shape)
    assert hill_alpha(weight, block_size) == pytest.approx(reference_alpha(weight, block_size), rel=5e-4)


@pytest.mark.parametrize("tail_fraction", [0.03, 0.3])
def test_hill_alpha_of_tail_fraction(tail_fraction):
    weight = gaussian(384, 384)
    expected = reference_alpha(weight, 64, tail_fraction)
    assert hill_alpha(weight, 64, tail_fraction) == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize(
    "scales",
    [
        torch.arange(1, 1025) ** -0.7,
        (torch.arange(128) + 1.0).repeat(8) ** -1.5,
        gaussian(1024, seed=1).exp(),
        gaussian(1024, 1, seed=1).exp(),
        gaussian(1024, 1024, seed=1).abs() ** 6,
        torch.tensor([10.0, 1.0]).repeat_interleave(512),
        torch.ones(1024).index_fill_(0, torch.tensor([7]), 100),
        torch.ones(1024).index_fill_(0, torch.tensor([300]), 100),
    ],
    ids=[
        *("power law", "power law in every block", "uneven columns", "uneven rows", "heavy tail", "uneven blocks"),
        *("one large column, sampled", "one large column, not sampled"),
    ],
)
def test_hill_alpha_equals_float64_reference_on_uneven_spectra(scales):
    weight = gaussian(1024, 1024) * scales
    assert hill_alpha(weight) == pytest.approx(reference_alpha(weight, 128), rel=5e-4)


@pytest.mark.parametrize(("scale", "decomposed"), [(1.0, 2), (100.0, 3)])
def test_hill_alpha_decomposes_only_a_sample_and_the_blocks_that_need_it(scale, decomposed, monkeypatch):
    weight = gaussian(128, 128 * 64)
    weight[0, 128:256] *= scale
    full, eigvalsh = [], torch.linalg.eigvalsh

    def counting(matrices):
        full.append(len(matrices) if matrices.shape[-1] == 128 else 0)
        return eigvalsh(matrices)

    monkeypatch.setattr(torch.linalg, "eigvalsh", counting)
    hill_alpha(weight)
    assert sum(full) == decomposed


def test_hill_alpha_of_gaussian_blocks_is_the_known_value():
    assert hill_alpha(gaussian(384, 640)) == pytest.approx(6.38, abs=0.3)


def test_hill_alpha_is_lower_for_a_heavier_tail():
    column_scales = torch.arange(1, 257) ** -0.7
    assert hill_alpha(gaussian(256, 256) * column_scales) < hill_alpha(gaussian(256, 256)) - 1


def test_hill_alpha_does_not_depend_on_chunks(monkeypatch):
    weight = gaussian(1024, 512)
    whole = hill_alpha(weight)
    monkeypatch.setattr(spectra, "CPU_CHUNK", 1)
    assert hill_alpha(weight) == pytest.approx(whole, rel=1e-6)


def test_hill_alpha_ignores_what_no_block_covers():
    weight = gaussian(128, 200)
    changed = weight.clone()
    changed[:, 128:] = 100
    assert hill_alpha(changed) == hill_alpha(weight)


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e-11, 1e9, 1e18, 1e37])
def test_hill_alpha_does_not_depend_on_scale(scale):
    weight = gaussian(256, 128)
    assert hill_alpha(weight * scale) == pytest.approx(hill_alpha(weight), rel=5e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_hill_alpha_takes_any_float(dtype):
    weight = gaussian(128, 256).to(dtype)
    assert hill_alpha(weight) == pytest.approx(hill_alpha(weight.float()), rel=1e-6)


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(256, 256),
        gaussian(256, 1) @ gaussian(1, 256, seed=1),
        gaussian(256, 2) @ gaussian(2, 256, seed=1) * 1e-20,
        torch.zeros(256, 256).index_fill_(0, torch.tensor([3]), 1e30),
        torch.eye(256),
        torch.full((128, 128), 1e-42),
    ],
    ids=["constant", "rank 1", "rank 2, tiny", "one row, huge", "flat spectrum", "subnormal"],
)
def test_hill_alpha_of_degenerate_matrices_is_bounded(weight):
    assert MIN_ALPHA <= hill_alpha(weight) <= MAX_ALPHA


def test_hill_alpha_of_zero_is_the_upper_bound():
    assert hill_alpha(torch.zeros(128, 128)) == MAX_ALPHA


def test_hill_alpha_of_low_rank_is_near_the_lower_bound():
    assert hill_alpha(gaussian(512, 8) @ gaussian(8, 512, seed=1)) < MIN_ALPHA + 0.1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_hill_alpha_refuses_what_is_not_finite(bad):
    weight = gaussian(128, 130)
    weight[5, 129] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        hill_alpha(weight)


@pytest.mark.parametrize("shape", [(127, 512), (512, 64), (128,), (2, 128, 128)])
def test_hill_alpha_refuses_a_matrix_without_a_block(shape):
    with pytest.raises(ValueError, match="at least 128"):
        hill_alpha(torch.ones(shape))


@pytest.mark.parametrize(("size", "spread"), [(128, 0.0), (128, 0.5), (256, 0.5)])
def test_relative_noise_is_that_of_random_matrices(size, spread):
    generator = torch.Generator().manual_seed(0)
    columns = (torch.randn(size, generator=generator) * spread).exp()
    alphas = [hill_alpha(torch.randn(size, size, generator=generator) * columns) for _ in range(100)]
    mean, deviation = np.mean(alphas), np.std(np.log(alphas))
    assert deviation == pytest.approx(relative_noise(mean, size * size), rel=0.5)
