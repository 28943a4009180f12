"""A decoder written from the README's format section alone: it imports nothing of the project's own."""

import json

import numpy as np
import torch
from safetensors import safe_open

PARTS = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def decode_unit(words, bits):
    """The 32 codes of one unit of ``bits`` words."""
    codes, done = [0] * 32, 0
    for p in PARTS[bits]:
        plane = words[done : done + p]
        for k in range(32):
            word = int(plane[(k // 2) * p // 16]) & 0xFFFFFFFF
            codes[k] |= (word >> (16 * (k % 2) + (k // 2) * p % 16) & (2**p - 1)) << done
        done += p
    return codes


def decode_row(packed, scale, zero_point, bits, group_size):
    codes = [code for start in range(0, len(packed), bits) for code in decode_unit(packed[start : start + bits], bits)]
    return [np.float32(scale[c // group_size]) * (code - zero_point[c // group_size]) for c, code in enumerate(codes)]


def test_readme_decoder_agrees_with_dequantize(mixed_checkpoint, dequantized_checkpoint):
    config = json.loads((mixed_checkpoint / "config.json").read_text())["quantization_config"]
    (shard,) = mixed_checkpoint.glob("*.safetensors")
    (dequantized,) = dequantized_checkpoint.glob("*.safetensors")
    seen = set()
    with safe_open(shard, "pt") as file, safe_open(dequantized, "pt") as plain:
        for module, projections in config["num_bits"].items():
            for projection, digits in projections.items():
                for expert, digit in enumerate(digits):
                    name = f"{module}.{expert}.{projection}"
                    packed, scale, zero_point = (
                        file.get_tensor(f"{name}.{suffix}")
                        for suffix in ("weight_packed", "weight_scale", "weight_zero_point")
                    )
                    weight = plain.get_tensor(f"{name}.weight")
                    assert packed.dtype == torch.int32
                    assert packed.shape == (weight.shape[0], weight.shape[1] * int(digit) // 32)
                    for row in (0, weight.shape[0] - 1):
                        values = decode_row(
                            packed[row].tolist(),
                            scale[row].float().numpy(),
                            zero_point[row].float().numpy(),
                            int(digit),
                            config["group_size"],
                        )
                        np.testing.assert_allclose(values, weight[row].numpy(), rtol=1e-6, atol=1e-9)
                    seen.add(int(digit))
    assert seen == set(range(1, 9))
