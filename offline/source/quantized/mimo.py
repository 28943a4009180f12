"""MiMo-V2's attention in float8: queries, keys and values in one matrix, laid out as shares of several ranks.

Its rows are one share after the other, ``[Q_0 | K_0 | V_0 | Q_1 | K_1 | V_1 | …]``, and each share begins blocks of its
own: one whose last block is not full has a row of scales more. vLLM takes this order in float8 alone. In bfloat16 it
reads all queries, then all keys, then all values, which is the order that is given here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from offline.source.quantized.joining import Parts, Reader
from offline.source.quantized.tensor import SCALE_DTYPES, QuantizedTensor, load_scale
from offline.source.stored import StoredTensor

MODEL_TYPE = "mimo_v2"
_BLOCK = 128
_JOINED = re.compile(r"model\.(mtp\.)?layers\.(\d+)\.self_attn\.qkv_proj\.weight")


@dataclass(frozen=True)
class SharedAttention(QuantizedTensor):
    """A matrix of attention in shares, whose numbers are in the order of vLLM's.

    weight: ``[shares * sum(rows), in_features]`` float8; scale: one for 128 by 128 numbers, ``[blocks of rows, blocks
    of columns]``, the rows' counted in each share or in the whole; rows: of queries, keys and values in a share.
    """

    weight: StoredTensor
    scale: StoredTensor
    shares: int
    rows: tuple[int, int, int]

    def load_float32(self, index: int | None = None) -> torch.Tensor:
        """As ``QuantizedTensor`` says; there are no slices."""
        share = self.shape[0] // self.shares
        scales = load_scale(self.scale)
        if scales.shape[0] == self.shares * -(-share // _BLOCK):
            scales = scales.unflatten(0, (self.shares, -1)).repeat_interleave(_BLOCK, 1)[:, :share].flatten(0, 1)
        else:
            scales = scales.repeat_interleave(_BLOCK, 0)[: self.shape[0]]
        values = self.weight.load_float32().mul_(scales.repeat_interleave(_BLOCK, 1)[:, : self.shape[1]])
        parts = values.unflatten(0, (self.shares, share)).split(self.rows, 1)
        return torch.cat([part.flatten(0, 1) for part in parts])


def shared_attention(config: Mapping[str, Any]) -> Reader:
    """A reader of these matrices by a model's config."""

    def read(name: str, parts: Parts) -> tuple[str, SharedAttention] | None:
        weight, match = parts.tensors[name], _JOINED.fullmatch(name)
        if match is None or weight.spec.dtype != torch.float8_e4m3fn:
            return None
        scale, shape = parts.take(f"{name}_scale_inv", name), weight.spec.shape
        shares, rows = _layout(config, name, sliding=bool(match[1]) or _slides(config, int(match[2])))
        share = sum(rows)
        columns = -(-shape[-1] // _BLOCK)
        fitting = [(shares * -(-share // _BLOCK), columns), (-(-shares * share // _BLOCK), columns)]
        if len(shape) != 2 or shape[0] != shares * share:
            raise ValueError(
                f"{name}: expected {shares} shares of {' + '.join(map(str, rows))} rows, which `num_key_value_heads` "
                f"and the numbers and sizes of heads in config.json say, got shape {shape}: download both again"
            )
        if scale.spec.shape not in fitting or scale.spec.dtype not in SCALE_DTYPES:
            raise ValueError(
                f"{name}_scale_inv: expected a float32 or bfloat16 scale of shape {fitting[0]}, "
                f"got {scale.spec.dtype} of shape {scale.spec.shape}: download the checkpoint again"
            )
        return name, SharedAttention((shape[0], shape[1]), 8, weight, scale, shares, rows)

    return read


def _slides(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer's attention slides, whose heads have other numbers and sizes. Those of drafts do."""
    pattern = config.get("hybrid_layer_pattern")
    if not isinstance(pattern, list) or layer >= len(pattern):
        raise ValueError(
            f"config.json: hybrid_layer_pattern: expected a number for layer {layer}, got {pattern!r:.80}: "
            "download it again"
        )
    return pattern[layer] == 1


def _layout(config: Mapping[str, Any], name: str, sliding: bool) -> tuple[int, tuple[int, int, int]]:
    """The number of shares, and how many rows of queries, keys and values are in each."""
    prefix = "swa_" if sliding else ""
    keys = [f"{prefix}{key}" for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim")]
    # As vLLM reads it, values are as wide as keys where nothing else is said.
    sizes = {**config, keys[3]: config.get(keys[3], config.get(keys[2]))}
    for key in ("num_key_value_heads", *keys):
        if type(number := sizes.get(key)) is not int or number < 1:
            raise ValueError(
                f"config.json: {key}: expected a number from 1 up for {name}, got {number!r:.80}: download it again"
            )
    shares = sizes["num_key_value_heads"]
    heads, key_heads, size, value_size = (sizes[key] for key in keys)
    if heads % shares or key_heads % shares:
        raise ValueError(
            f"{name}: expected heads in {shares} equal shares, as many as `num_key_value_heads` in config.json, "
            f"got {heads} heads and {key_heads} of keys: download config.json again"
        )
    return shares, (heads // shares * size, key_heads // shares * size, key_heads // shares * value_size)
