import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from alphaq_vllm.cache import cache_directory
from tests.reliability.bad_inputs import numbers_by_test

MODEL = Path(__file__).parent / "models" / "docs-moe"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def pytest_configure(config):
    """Keep out of the user's cache, but for compiled kernels, and give processes that run tests side by side, and the
    servers that these start, a share of the cores each.
    """
    folder = TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    kernels = cache_directory() / "kernels"
    kernels.mkdir(mode=0o700, parents=True, exist_ok=True)
    Path(folder.name, "kernels").symlink_to(kernels)
    os.environ["ALPHAQ_CACHE"] = folder.name
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        torch.set_num_threads(threads)
        # Bound to cores, the servers of both would be bound to the same ones.
        os.environ |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def pytest_collection_modifyitems(items):
    """Give tests their numbers in the table of bad inputs, and begin with those that take longest."""
    items.sort(key=lambda item: "tests/serving/" not in item.nodeid)
    numbers = numbers_by_test()
    for item in items:
        for name in dict.fromkeys((item.nodeid, item.nodeid.split("[")[0])):
            for number in numbers.get(name, ()):
                item.add_marker(pytest.mark.bad_input(number=number))


def run_alphaq(*arguments):
    """A command line of the converter, in this process, which has imported all that it needs."""
    # The kernels' tests run where there is torch and Triton alone.
    from offline.__main__ import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["alphaq", *map(str, arguments)])
        try:
            main()
        except SystemExit as ended:
            assert not ended.code


@pytest.fixture(scope="session")
def mixed_checkpoint(tmp_path_factory):
    """The embedded model with every width from 1 to 8, gate, up and down of one expert differing."""
    folder = tmp_path_factory.mktemp("mixed")
    config = json.loads((MODEL / "config.json").read_text())
    matrices = [
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
        for layer in range(config["num_hidden_layers"])
        for expert in range(config["num_experts"])
        for projection in PROJECTIONS
    ]
    bit_map = folder / "bit_map.json"
    # With these widths no token of the tests' text is so nearly tied between two experts that rounding decides: the
    # least margin between probabilities is 1e-5. With others it is 3e-7, and ranks, which add in another order, differ.
    bit_map.write_text(json.dumps({name: 1 + (i + 5) % 8 for i, name in enumerate(matrices)}))
    checkpoint = folder / "checkpoint"
    # Groups of 64 columns, so that two ranks can share the 128 columns of down_proj.
    run_alphaq("convert", MODEL, checkpoint, "--bit-map", bit_map, "--group-size", "64", "--quantizer", "mse")
    return checkpoint


@pytest.fixture(scope="session")
def dequantized_checkpoint(mixed_checkpoint, tmp_path_factory):
    """What the mixed checkpoint means, in float32."""
    folder = tmp_path_factory.mktemp("dequantized") / "model"
    run_alphaq("dequantize", mixed_checkpoint, folder, "--dtype", "float32")
    return folder
