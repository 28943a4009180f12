"""Statistics of the matrices of a real checkpoint."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from offline.allocation.costs import noise
from offline.quantizers.quantize import quantization_mse
from offline.sensitivity.matrices import MatrixStats, measure_matrices
from offline.sensitivity.reach import reaches
from offline.sensitivity.spectra import hill_alpha
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts, load_weight

STATS = [MatrixStats("a", 3.0, 2.0, 6.0, 64, {2: 0.1, 4: 0.01}), MatrixStats("b", 3.0, 1.0, 3.0, 64, {2: 0.3, 4: 0.02})]


@pytest.mark.parametrize("widths", [(2, 5), ()])
def test_measure_describes_every_matrix(tiny_model, widths):
    path = tiny_model("mixtral")
    source = open_checkpoint(str(path))
    matrices = find_experts(source).matrices
    stats = measure_matrices(source, matrices, widths, 64)
    assert [matrix.name for matrix in stats] == [matrix.name for matrix in matrices]
    weight = load_file(path / "model.safetensors")["model.layers.1.block_sparse_moe.experts.2.w2.weight"].float()
    last = next(matrix for matrix in stats if matrix.name == "model.layers.1.block_sparse_moe.experts.2.w2")
    assert last.alpha == pytest.approx(hill_alpha(weight, 128), rel=1e-4)
    assert last.variance == pytest.approx(float(weight.double().var(correction=0)), rel=1e-5)
    expert = [load_weight(source, matrix) for matrix in matrices if matrix.name.startswith(last.name[:-2])]
    assert last.reach == reaches(expert, torch.nn.functional.silu)[-1]
    assert last.numel == 128 * 128
    expected = quantization_mse(weight, widths, 64) if widths else []
    assert last.mse == pytest.approx(dict(zip(widths, expected, strict=True)))


def test_measure_names_the_matrix_that_is_not_finite(model):
    from safetensors.torch import save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.experts.1.up_proj.weight"][0, :2] = torch.inf
    save_file(tensors, model / "model.safetensors")
    source = open_checkpoint(str(model))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.1\.up_proj\.weight: .* got 2 NaN or infinite"):
        measure_matrices(source, find_experts(source).matrices, (), 128)


def test_noise_analytic_falls_fourfold_with_a_bit():
    np.testing.assert_allclose(noise(STATS, (1, 3), "analytic"), [[0.5, 0.03125], [0.25, 0.015625]])


def test_noise_measured_is_what_was_measured():
    np.testing.assert_array_equal(noise(STATS, (2, 4), "measured"), [[0.1, 0.01], [0.3, 0.02]])


def test_noise_of_the_expert_is_the_error_times_the_reach_by_the_mean_of_the_layer():
    names = [f"layers.{layer}.experts.0.{projection}" for layer in (0, 1) for projection in ("up", "down")]
    stats = [MatrixStats(name, 3.0, 1.0, reach, 8, {2: 0.4}) for name, reach in zip(names, (1, 3, 50, 50), strict=True)]
    np.testing.assert_allclose(noise(stats, (2,), "expert"), [[0.025], [0.075], [0.05], [0.05]])
    silent = [MatrixStats("layers.0.experts.0.up", 3.0, 0.0, 0.0, 8, {2: 0.0})]
    assert noise(silent, (2,), "expert").tolist() == [[0.0]]
