"""MiMo-V2's attention in float8, published in shares of several ranks: read in the order of vLLM's bfloat16."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaq_vllm import convert
from offline.source.checkpoint import SINGLE, open_checkpoint
from offline.source.families import find_experts
from tests.offline.conftest import publish, save_tiny_model
from tests.offline.source.quantized.test_fp8 import meaning, to_fp8

BLOCK = (128, 128)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
# The first layer has two heads for each one of keys and values; the second, which slides, two of keys in each share.
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "v_head_dim": 64,
         "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 32, "swa_v_head_dim": 80,
         "hybrid_layer_pattern": [0, 1]}  # fmt: skip
# By name, how many rows of queries, keys and values each of the two shares has: 160 and 288, in two and three blocks.
ROWS = {
    "model.layers.0.self_attn.qkv_proj.weight": (64, 32, 64),
    "model.layers.1.self_attn.qkv_proj.weight": (64, 64, 160),
    "model.mtp.layers.0.self_attn.qkv_proj.weight": (64, 64, 160),
}
NAME = "model.layers.1.self_attn.qkv_proj.weight"


def save_mimo(folder, together=False):
    """A tiny one whose attention is in float8, with scales by share or ``together``; what each matrix means, by name.

    That is by the definition: the rows of all queries, then keys, then values, of what each share means.
    """
    save_tiny_model("mimo_v2", folder)
    publish(folder, {**HEADS, "quantization_config": FP8})
    tensors = load_file(folder / SINGLE)
    meanings = {}
    for name, rows in ROWS.items():
        # Of other sizes from block to block, so that no scale stands for another's.
        shares = [torch.randn(sum(rows), 128) * torch.linspace(0.1, 4, sum(rows))[:, None] * (1 + i) for i in range(2)]
        whole = [torch.cat(shares)] if together else shares
        coded = [to_fp8(share, BLOCK) for share in whole]
        tensors[name] = torch.cat([codes.view(torch.uint8) for codes, _ in coded]).view(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.cat([scale for _, scale in coded])
        values = torch.cat([meaning(*one, BLOCK) for one in coded])
        parts = zip(*(share.split(rows) for share in values.split(sum(rows))), strict=True)
        meanings[name] = torch.cat([torch.cat(part) for part in parts])
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    return meanings


@pytest.mark.parametrize("together", [False, True])
def test_attention_is_copied_in_the_order_of_vllm(together, tmp_path):
    meanings = save_mimo(tmp_path / "source", together)
    stored = load_file(tmp_path / "source" / SINGLE)
    # What tells the two forms of scales apart.
    assert stored[f"{NAME}_scale_inv"].shape == ((5, 1) if together else (6, 1))
    convert(tmp_path / "source", tmp_path / "out", bits=3)
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    copied = load_file(weights)
    for name, values in meanings.items():
        assert torch.equal(copied[name], values.bfloat16()), name
    assert not [name for name in copied if name.endswith("_scale_inv")]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({f"{NAME}_scale_inv": torch.ones(4, 1)}, rf"{NAME}_scale_inv: expected .* of shape \(6, 1\), got .*\(4, 1\)"),
        ({f"{NAME}_scale_inv": None}, rf"{NAME}: expected {NAME}_scale_inv beside it, got none"),
        ({NAME: torch.zeros(448, 128).to(torch.float8_e4m3fn)}, f"{NAME}: expected 2 shares of 64 + 64 + 160 rows"),
        ({"hybrid_layer_pattern": [0]}, "config.json: hybrid_layer_pattern: expected a number for layer 1, got [0]"),
        ({"swa_head_dim": "32"}, f"config.json: swa_head_dim: expected a number from 1 up for {NAME}, got '32'"),
        ({"num_key_value_heads": 3}, "expected heads in 3 equal shares"),
    ],
)
def test_attention_that_does_not_fit_its_config_is_refused(damage, message, tmp_path):
    save_mimo(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    for key, value in damage.items():
        if key in HEADS:
            publish(tmp_path, {key: value})
        elif value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    with pytest.raises(ValueError, match=message if ".*" in message else re.escape(message)):
        find_experts(open_checkpoint(str(tmp_path)))


def test_attention_in_bfloat16_stays_as_it_is(tmp_path):
    save_tiny_model("mimo_v2", tmp_path)
    stored, opened = load_file(tmp_path / SINGLE), open_checkpoint(str(tmp_path))
    assert torch.equal(opened.load(NAME), stored[NAME])
