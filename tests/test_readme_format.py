"""A decoder written from docs/format.md alone: it imports nothing of the project's own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

PARTS = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def place(k, p):
    """The word and the lowest bit of the field of code ``k`` in a plane of ``p``-bit fields."""
    return (k // 2) * p // 16, 16 * (k % 2) + (k // 2) * p % 16


def decode_unit(words, bits):
    """The 32 codes of one unit of ``bits`` words."""
    codes, done = [0] * 32, 0
    for p in PARTS[bits]:
        plane = words[done : done + p]
        for k in range(32):
            word, shift = place(k, p)
            codes[k] |= ((int(plane[word]) & 0xFFFFFFFF) >> shift & (2**p - 1)) << done
        done += p
    return codes


def decode_row(packed, scale, grid, bits, group_size):
    codes = [code for start in range(0, len(packed), bits) for code in decode_unit(packed[start : start + bits], bits)]
    weights = []
    for c, code in enumerate(codes):
        byte = grid[c // group_size]
        step, zero_point = byte % 16 + 1, (byte // 16 + 6) / 32 * 2**bits
        weights.append(np.float32(scale * step * (code - zero_point)))
    return weights


def test_example_is_by_the_rule():
    lower, upper = place(5, 2), place(5, 1)
    # The plane of one bit follows the two words of the plane of two.
    example = (
        f"Code 5 has its lower bits in word {lower[0]}, from bit {lower[1]}, and its upper bit in word {2 + upper[0]}, "
        f"bit {upper[1]}."
    )
    document = Path(__file__).parents[1] / "docs" / "format.md"
    assert example in " ".join(document.read_text().split())


def test_documented_decoder_agrees_with_dequantize(mixed_checkpoint, dequantized_checkpoint):
    config = json.loads((mixed_checkpoint / "config.json").read_text())["quantization_config"]
    (shard,) = mixed_checkpoint.glob("*.safetensors")
    (dequantized,) = dequantized_checkpoint.glob("*.safetensors")
    seen = set()
    with safe_open(shard, "pt") as file, safe_open(dequantized, "pt") as plain:
        for module, projections in config["num_bits"].items():
            for projection, digits in projections.items():
                for expert, digit in enumerate(digits):
                    name = f"{module}.{expert}.{projection}"
                    packed, scale, grid = (
                        file.get_tensor(f"{name}.{suffix}")
                        for suffix in ("weight_packed", "weight_scale", "weight_grid")
                    )
                    weight = plain.get_tensor(f"{name}.weight")
                    assert (packed.dtype, scale.dtype, grid.dtype) == (torch.int32, torch.bfloat16, torch.uint8)
                    assert scale.shape == (weight.shape[0], 1)
                    assert packed.shape == (weight.shape[0], weight.shape[1] * int(digit) // 32)
                    for row in (0, weight.shape[0] - 1):
                        values = decode_row(
                            packed[row].tolist(),
                            scale[row].item(),
                            grid[row].tolist(),
                            int(digit),
                            config["group_size"],
                        )
                        np.testing.assert_allclose(values, weight[row].numpy(), rtol=1e-6, atol=1e-9)
                    seen.add(int(digit))
    assert seen == set(range(1, 9))


def run(command, *arguments):
    subprocess.run([sys.executable, "-m", f"offline.{command}", *map(str, arguments)], check=True)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_documented_decoder_of_linear_layers_agrees_with_dequantize(num_bits, tmp_path):
    model = Path(__file__).parent / "models" / "docs-moe"
    run("convert", model, tmp_path / "packed", "--mode", "uniform", "--linear-bits", num_bits)
    run("dequantize", tmp_path / "packed", tmp_path / "plain", "--dtype", "float32")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    (shard,), (dequantized,) = ((tmp_path / name).glob("*.safetensors") for name in ("packed", "plain"))
    with safe_open(shard, "pt") as file, safe_open(dequantized, "pt") as plain:
        for group in config["linear"]:
            assert group["num_bits"] == num_bits
            for module in group["modules"]:
                weight = plain.get_tensor(f"{module}.weight")
                packed, scale = (file.get_tensor(f"{module}.{suffix}") for suffix in ("weight_packed", "weight_scale"))
                assert (packed.dtype, scale.dtype) == (torch.int32, torch.bfloat16)
                assert packed.shape == (weight.shape[0], weight.shape[1] * num_bits // 32)
                for r in (0, weight.shape[0] - 1):
                    words = [int(word) & 0xFFFFFFFF for word in packed[r]]
                    for c in range(weight.shape[1]):
                        field = words[c * num_bits // 32] >> (c * num_bits % 32) & (2**num_bits - 1)
                        code = field - 2 ** (num_bits - 1)
                        assert weight[r, c] == float(scale[r, c // group["group_size"]]) * code
