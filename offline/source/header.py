"""The header of a safetensors file, read with every claim checked and written for a file that is yet to be filled."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from alphaq_vllm.format import TensorSpec
from offline.source.stored import StoredTensor
from offline.strict_json import unique

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
# The limit of the safetensors library.
MAX_HEADER_BYTES = 100_000_000

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_LFS_START = b"version https://git-lfs.github.com/"


def refuse_lfs_pointer(path: Path) -> None:
    """Raise ValueError if the file is the pointer that git leaves in place of a large file."""
    with path.open("rb") as file:
        if file.read(len(_LFS_START)) == _LFS_START:
            raise ValueError(
                f"{path}: expected the file itself, got a Git LFS pointer: run 'git lfs pull' in its directory"
            )


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, in the order of their data.

    Raises ValueError unless the header is whole and well formed and its tensors fill the rest of the file exactly,
    without a gap or an overlap.
    """
    refuse_lfs_pointer(path)
    size = path.stat().st_size
    if size < _LENGTH_BYTES:
        raise ValueError(f"{path}: expected a safetensors file, got {size} bytes: download it again")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"{path}: header length: expected at most {MAX_HEADER_BYTES} bytes, got {length}: "
                "this is not a safetensors file, or it is damaged"
            )
        if length > size - _LENGTH_BYTES:
            raise ValueError(
                f"{path}: truncated header: expected {length} bytes, got {size - _LENGTH_BYTES}: download it again"
            )
        text = file.read(length)
    try:
        entries = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: header: expected JSON, got {error}: download the file again") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: header: expected a JSON object, got {type(entries).__name__}")
    entries.pop(_METADATA, None)
    return _place(path, entries, _LENGTH_BYTES + length, size)


def layout(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The header of a new file, and the offset of each tensor in it.

    Wider dtypes come first, which aligns every tensor to its own dtype as readers expect.
    """
    entries: dict[str, Any] = {_METADATA: {"format": "pt"}}
    codes = {dtype: code for code, dtype in DTYPES.items()}
    begins, end = {}, 0
    for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
        begins[name], end = end, end + spec.nbytes
        offsets = [begins[name], end]
        entries[name] = {"dtype": codes[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return header, {name: len(header) + begin for name, begin in begins.items()}


def _place(path: Path, entries: Mapping[str, Any], start: int, size: int) -> dict[str, StoredTensor]:
    parsed = {name: _parse_entry(f"{path}: tensor {name!r}", entry) for name, entry in entries.items()}
    tensors, end = {}, 0
    for name, (begin, spec) in sorted(parsed.items(), key=lambda item: (item[1][0], item[1][1].nbytes)):
        if begin != end:
            raise ValueError(
                f"{path}: tensor {name!r}: expected its data to begin at {end}, got {begin}: a gap or overlap"
            )
        tensors[name] = StoredTensor(path, start + begin, spec)
        end += spec.nbytes
    if start + end != size:
        raise ValueError(
            f"{path}: expected {end} bytes of tensor data as its header says, got {size - start}: download it again"
        )
    return tensors


def _parse_entry(where: str, entry: Any) -> tuple[int, TensorSpec]:
    match entry:
        case {"dtype": dtype, "shape": [*shape], "data_offsets": [begin, end]} if len(entry) == 3:
            pass
        case _:
            raise ValueError(f"{where}: expected dtype, shape and two data_offsets, got {entry!r:.80}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where}: dtype: expected one of {', '.join(DTYPES)}, got {dtype!r:.80}")
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise ValueError(f"{where}: expected shape and data_offsets of integers from 0 up, got {entry!r:.80}")
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{where}: data_offsets: expected the bytes of {dtype} {shape}, got {end - begin} bytes")
    return begin, TensorSpec(tuple(shape), DTYPES[dtype])
