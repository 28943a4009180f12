from __future__ import annotations

import runpy
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def interpreter():
    """A process in which Triton interprets kernels; ``submit`` runs an importable function there."""
    set_up = (str(Path(__file__).with_name("interpret.py")), None, "__main__")
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=runpy.run_path, initargs=set_up) as pool:
        assert pool.submit(torch.empty, 1).result().isnan()
        yield pool
