"""The kernels are those for which all of their tests passed."""

import pytest
import torch

from tests.kernels.digest import OTHERS, digest, passed


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU Triton comes with torch, and the GPU runs every case")
@pytest.mark.parametrize("device", OTHERS)
def test_whole_grids_passed_for_these_sources(device):
    assert passed().get(device) == digest(device), (
        f"the kernels, their tests or Triton changed: run `make test-kernels-{device}` and commit PASSED"
    )
