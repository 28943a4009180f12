"""From an AlphaQ checkpoint to an ordinary one with exactly the values that it means."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alphaq_vllm import linear_packing, packing
from alphaq_vllm.format import GRID, PACKED, SCALE, WEIGHTS_FILE, AlphaQSpec, LinearFormat, TensorSpec
from alphaq_vllm.paths import check_path
from offline.progress import parse_bytes
from offline.source.alphaq import check_alphaq
from offline.source.architectures import text_config, without_code
from offline.source.checkpoint import Checkpoint, open_checkpoint
from offline.source.families import ExpertMatrix, tensor_shape
from offline.source.linear import LinearLayer, stored_linear_layers
from offline.threads import choose_workers
from offline.writing.output import check_output, conditions, open_output, resolved
from offline.writing.writer import DEFAULT_SHARD_BYTES, Piece, Writer, copied, plan_shards

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dequantize(
    model: str | Path,
    out: str | Path,
    *,
    dtype: str = "auto",
    max_shard_size: int | str = DEFAULT_SHARD_BYTES,
    resume: bool = False,
    workers: int | None = None,
) -> dict[str, Any]:
    """Turn an AlphaQ checkpoint back into an ordinary one, with exactly the values that it means.

    Args:
        model: An AlphaQ checkpoint: a directory, or a name on the Hugging Face Hub.
        out: A directory that is empty or does not exist.
        dtype: Of the experts' weights: ``bfloat16``, ``float16``, ``float32``, or ``auto``, the one that the config
            names. They are computed in float32 and rounded once.
        max_shard_size: Of the data in one file, in bytes or as ``4GiB``.
        resume: Take up what an interrupted run has left.
        workers: Processes to use, which changes no byte; by default as many as help.

    Returns:
        What was done, with sizes in bytes.

    Raises:
        ValueError: For anything that is wrong with the checkpoint. No output is left then.
        OSError: For files that cannot be read or written. What is done so far is kept for ``resume``.
    """
    start = time.monotonic()
    checkpoint = open_checkpoint(str(model))
    widths = check_alphaq(checkpoint)
    dtype = _resolve(dtype, checkpoint)
    shards = plan_shards(_pieces(checkpoint, widths, _DTYPES[dtype]), parse_bytes(max_shard_size))
    size = sum(shard.nbytes for shard in shards)
    out = resolved(out)
    check_path(out)
    check_output(out, checkpoint.path.resolve(), size, resume)
    dropped = ("quantization_config", WEIGHTS_FILE, "dtype", "torch_dtype")
    kept = {key: value for key, value in checkpoint.config.items() if key not in dropped}
    config = {**without_code(kept), "dtype": dtype}
    settings = {"dtype": dtype, "max_shard_bytes": parse_bytes(max_shard_size)}
    with open_output(out, conditions(checkpoint, settings), resume) as output:
        writer = Writer(output, shards, config, checkpoint.sidecars)
        writer.write(choose_workers(workers, sum(matrix.numel for matrix in widths)), shared=checkpoint)
    return {
        "source": str(model),
        "output": str(out),
        "matrices": len(widths),
        "dtype": dtype,
        "code": checkpoint.beside.code,
        "left": checkpoint.beside.left,
        "size_before": checkpoint.nbytes,
        "size_after": size,
        "seconds": time.monotonic() - start,
    }


def _resolve(dtype: str, checkpoint: Checkpoint) -> str:
    if dtype in _DTYPES:
        return dtype
    if dtype != "auto":
        raise ValueError(f"`dtype`: expected auto or one of {', '.join(_DTYPES)}, got {dtype!r}")
    # transformers 4 called it torch_dtype.
    parts, keys = (checkpoint.config, text_config(checkpoint.config)), ("dtype", "torch_dtype")
    named = next((part[key] for part in parts for key in keys if key in part), None)
    if named not in _DTYPES:
        raise ValueError(f"config.json: dtype: expected one of {', '.join(_DTYPES)}, got {named!r:.80}: pass `dtype`")
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
    absorbed = {f"{name}.{suffix}" for name in quantized for suffix in (PACKED, SCALE, GRID)}
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
        packed, scale, grid = (checkpoint.load(f"{matrix.name}.{suffix}") for suffix in (PACKED, SCALE, GRID))
        weight = packing.dequantize(packed, scale, grid, num_bits, spec.dtype)
        matrix.view(tensor).copy_(weight)
    return {matrix.tensor: tensor}


def dequantize_linear(
    checkpoint: Checkpoint, layer: LinearLayer, linear_format: LinearFormat, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The ordinary tensor that a stored layer means."""
    packed, scale = (checkpoint.load(f"{layer.name}.{suffix}") for suffix in (PACKED, SCALE))
    return {layer.tensor: linear_packing.dequantize(packed, scale, linear_format.num_bits, dtype)}
