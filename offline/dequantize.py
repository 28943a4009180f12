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
from alphaq_vllm.format import PACKED, SCALE, ZERO, AlphaQSpec, TensorSpec
from offline.cli import Parser, add_output_options, add_work_options, run
from offline.progress import format_bytes
from offline.quantizers.linear import dequantize_linear, stored_linear_layers
from offline.source.checkpoint import Checkpoint, open_checkpoint
from offline.source.families import ExpertMatrix, tensor_shape
from offline.threads import choose_workers
from offline.validate import check_alphaq
from offline.writing.output import check_output, conditions, open_output
from offline.writing.writer import (
    DEFAULT_SHARD_BYTES,
    Piece,
    copied,
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
    model: str,
    out: Path,
    dtype: str = "auto",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    workers: int | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Dequantize a checkpoint.

    model: an AlphaQ checkpoint; out: a directory that is empty or does not exist; dtype: of the experts' weights,
    ``bfloat16``, ``float16``, ``float32``, or ``auto`` for the one that the config names; workers:
    processes to use, which changes no byte (see ``choose_workers``); resume: see ``open_output``.
    Returns what was done, with sizes in bytes.
    Raises ValueError or OSError for anything that is wrong, and then leaves no output, or one to be resumed.
    """
    start = time.monotonic()
    checkpoint = open_checkpoint(model)
    widths = check_alphaq(checkpoint)
    dtype = _resolve(dtype, checkpoint)
    shards = plan_shards(_pieces(checkpoint, widths, _DTYPES[dtype]), max_shard_bytes)
    size = sum(shard.nbytes for shard in shards)
    out = out.resolve()
    check_output(out, checkpoint.path.resolve(), size, resume)
    dropped = ("quantization_config", "dtype", "torch_dtype")
    config = {**{key: value for key, value in checkpoint.config.items() if key not in dropped}, "dtype": dtype}
    settings = {"dtype": dtype, "max_shard_bytes": max_shard_bytes}
    with open_output(out, conditions(checkpoint, settings), resume) as output:
        write_checkpoint(
            output,
            shards,
            config,
            checkpoint.sidecars,
            workers=choose_workers(workers, sum(matrix.numel for matrix in widths)),
            shared=checkpoint,
        )
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
    add_work_options(parser)
    add_output_options(parser)
    args = parser.parse_args(arguments)
    result = dequantize(args.checkpoint, args.out, args.dtype, args.max_shard_size, args.workers, args.resume)
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
    """One piece for each tensor of matrices in the place of its first codes, and one for each unquantized tensor."""
    tensors: dict[str, list[ExpertMatrix]] = {}
    for matrix in widths:
        tensors.setdefault(matrix.tensor, []).append(matrix)
    first = {f"{matrices[0].name}.{PACKED}": matrices for matrices in tensors.values()}
    formats = stored_linear_layers(checkpoint, AlphaQSpec.from_dict(checkpoint.config["quantization_config"]).linear)
    linear = {f"{layer.name}.{PACKED}": layer for layer in formats}
    quantized = [layer.name for layer in formats] + [matrix.name for matrix in widths]
    absorbed = {f"{name}.{suffix}" for name in quantized for suffix in (PACKED, SCALE, ZERO)}
    pieces = []
    for name in checkpoint.tensors:
        if layer := linear.get(name):
            specs = {layer.tensor: TensorSpec(layer.shape, dtype)}
            pieces.append(Piece(specs, partial(dequantize_linear, checkpoint, layer, formats[layer], dtype)))
        elif matrices := first.get(name):
            spec = TensorSpec(tensor_shape(matrices), dtype)
            compute = partial(_dequantized, checkpoint, {matrix: widths[matrix] for matrix in matrices}, spec)
            pieces.append(Piece({matrices[0].tensor: spec}, compute))
        elif name not in absorbed:
            pieces.append(copied(checkpoint, name))
    return pieces


def _dequantized(checkpoint: Checkpoint, widths: dict[ExpertMatrix, int], spec: TensorSpec) -> dict[str, torch.Tensor]:
    """The tensor of an ordinary checkpoint that holds these matrices."""
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    for matrix, num_bits in widths.items():
        packed, scale, zero_point = (checkpoint.load(f"{matrix.name}.{suffix}") for suffix in (PACKED, SCALE, ZERO))
        weight = packing.dequantize(packed, scale, zero_point, num_bits, spec.dtype)
        matrix.view(tensor).copy_(weight)
    return {matrix.tensor: tensor}


if __name__ == "__main__":
    run(main)
