"""``python -m offline.dequantize``: an ordinary checkpoint with exactly the values that an AlphaQ checkpoint means."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alphaq_vllm import packing
from alphaq_vllm.format import PACKED, SCALE, ZERO, TensorSpec
from offline.checkpoint import Checkpoint, open_checkpoint
from offline.cli import Parser, add_output_options, run
from offline.families import ExpertMatrix
from offline.progress import format_bytes
from offline.validate import check_alphaq
from offline.writer import (
    DEFAULT_SHARD_BYTES,
    Piece,
    check_output,
    copied,
    new_directory,
    plan_shards,
    write_checkpoint,
)

_DESCRIPTION = """Turn an AlphaQ checkpoint back into an ordinary one, so that any other program can check it.

A weight is scale * (code - zero_point), computed in float32. With --dtype float32 it is stored as computed; float16
and bfloat16 round it once. All other tensors are copied unchanged."""

_EXAMPLES = """\
  python -m offline.dequantize ./model-alphaq ./model-dequantized
  python -m offline.dequantize ./model-alphaq ./model-float32 --dtype float32"""

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dequantize(
    model: str, out: Path, dtype: str = "auto", max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> dict[str, Any]:
    """Dequantize a checkpoint.

    model: an AlphaQ checkpoint; out: a directory that is empty or does not exist; dtype: of the experts' weights,
    ``bfloat16``, ``float16``, ``float32``, or ``auto`` for the one that the config names.
    Returns what was done, with sizes in bytes.
    Raises ValueError or OSError for anything that is wrong, and then leaves no output.
    """
    start = time.monotonic()
    checkpoint = open_checkpoint(model)
    widths = check_alphaq(checkpoint)
    dtype = _resolve(dtype, checkpoint)
    shards = plan_shards(_pieces(checkpoint, widths, _DTYPES[dtype]), max_shard_bytes)
    size = sum(shard.nbytes for shard in shards)
    out = out.resolve()
    check_output(out, checkpoint.path.resolve(), size)
    dropped = ("quantization_config", "dtype", "torch_dtype")
    config = {**{key: value for key, value in checkpoint.config.items() if key not in dropped}, "dtype": dtype}
    with new_directory(out) as directory:
        write_checkpoint(directory, shards, config, checkpoint.sidecars)
    return {
        "source": model,
        "output": str(out),
        "matrices": len(widths),
        "dtype": dtype,
        "size_before": checkpoint.nbytes,
        "size_after": size,
        "seconds": time.monotonic() - start,
    }


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = Parser("dequantize", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("checkpoint", help="directory of an AlphaQ checkpoint, or name of one on the Hub")
    parser.add_argument("out", type=Path, help="output directory: new or empty")
    parser.add_argument(
        "--dtype", choices=("auto", *_DTYPES), default="auto", help="of expert weights (default auto: the config's)"
    )
    add_output_options(parser)
    args = parser.parse_args(arguments)
    result = dequantize(args.checkpoint, args.out, args.dtype, args.max_shard_size)
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['output']}: {result['matrices']} expert matrices in {result['dtype']}, "
            f"{format_bytes(result['size_before'])} -> {format_bytes(result['size_after'])}, {result['seconds']:.1f} s"
        )


def _resolve(dtype: str, checkpoint: Checkpoint) -> str:
    if dtype != "auto":
        return dtype
    # transformers 4 called it torch_dtype.
    named = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    if named not in _DTYPES:
        raise ValueError(f"config.json: dtype: expected one of {', '.join(_DTYPES)}, got {named!r:.80}: pass --dtype")
    return named


def _pieces(checkpoint: Checkpoint, widths: dict[ExpertMatrix, int], dtype: torch.dtype) -> list[Piece]:
    """One piece for each matrix in the place of its codes, and one for each tensor that was not quantized."""
    packed = {f"{matrix.name}.{PACKED}": matrix for matrix in widths}
    absorbed = {f"{matrix.name}.{suffix}" for matrix in widths for suffix in (SCALE, ZERO)}
    pieces = []
    for name in checkpoint.tensors:
        if matrix := packed.get(name):
            specs = {matrix.tensor: TensorSpec(matrix.shape, dtype)}
            pieces.append(Piece(specs, partial(_dequantized, checkpoint, matrix, widths[matrix], dtype)))
        elif name not in absorbed:
            pieces.append(copied(checkpoint, name))
    return pieces


def _dequantized(
    checkpoint: Checkpoint, matrix: ExpertMatrix, num_bits: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    packed, scale, zero_point = (checkpoint.load(f"{matrix.name}.{suffix}") for suffix in (PACKED, SCALE, ZERO))
    return {matrix.tensor: packing.dequantize(packed, scale, zero_point, num_bits, dtype)}


if __name__ == "__main__":
    run(main)
