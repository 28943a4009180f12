import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.bad_inputs import numbers_by_test

MODEL = Path(__file__).parent / "models" / "docs-moe"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def pytest_collection_modifyitems(items):
    """Give tests their numbers in the table of bad inputs."""
    numbers = numbers_by_test()
    for item in items:
        for name in dict.fromkeys((item.nodeid, item.nodeid.split("[")[0])):
            for number in numbers.get(name, ()):
                item.add_marker(pytest.mark.bad_input(number=number))


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
    bit_map.write_text(json.dumps({name: 1 + i % 8 for i, name in enumerate(matrices)}))
    checkpoint = folder / "checkpoint"
    command = [sys.executable, "-m", "offline.convert", str(MODEL), str(checkpoint)]
    # Groups of 64 columns, so that two ranks can share the 128 columns of down_proj.
    subprocess.run([*command, "--bit-map", str(bit_map), "--group-size", "64", "--quantizer", "mse"], check=True)
    return checkpoint


@pytest.fixture(scope="session")
def dequantized_checkpoint(mixed_checkpoint, tmp_path_factory):
    """What the mixed checkpoint means, in float32."""
    folder = tmp_path_factory.mktemp("dequantized") / "model"
    command = [sys.executable, "-m", "offline.dequantize", str(mixed_checkpoint), str(folder), "--dtype", "float32"]
    subprocess.run(command, check=True)
    return folder
