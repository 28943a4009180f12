"""Writing a checkpoint: planned to the byte before it is computed, computed piece by piece, complete or absent.

The header of a shard depends only on names, shapes and dtypes, so it is written first and each tensor goes to its
place as soon as it exists: memory holds one piece at a time, whatever the size of a shard.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BufferedWriter
from pathlib import Path
from typing import Any

import torch

from alphaq_vllm.format import TensorSpec
from offline.checkpoint import CONFIG, INDEX, Checkpoint
from offline.header import layout
from offline.progress import Progress, format_bytes
from offline.threads import one_thread

DEFAULT_SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Piece:
    """Tensors that are computed and stored together: their specs, and the function that computes them."""

    specs: Mapping[str, TensorSpec]
    compute: Callable[[], Mapping[str, torch.Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(spec.nbytes for spec in self.specs.values())


@dataclass(frozen=True)
class Shard:
    """One safetensors file to be written."""

    name: str
    pieces: Sequence[Piece]

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The specs of all tensors."""
        return {name: spec for piece in self.pieces for name, spec in piece.specs.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(layout(self.specs)[0]) + sum(piece.nbytes for piece in self.pieces)


def copied(source: Checkpoint, name: str) -> Piece:
    """The piece that takes a tensor over unchanged."""
    return Piece({name: source.spec(name)}, lambda: {name: source.load(name)})


def plan_shards(pieces: Sequence[Piece], max_shard_bytes: int) -> list[Shard]:
    """Divide pieces, in their order, among files of at most ``max_shard_bytes`` of data.

    A larger piece has a file of its own.
    """
    groups: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not groups or piece.nbytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(piece)
        room -= piece.nbytes
    names = (f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1))
    return [Shard(name, group) for name, group in zip(names, groups, strict=True)]


def check_output(out: Path, source: Path, needed_bytes: int) -> None:
    """Raise unless ``out`` can become a new directory apart from ``source`` with room for ``needed_bytes``.

    Both paths are absolute and resolved.
    """
    if out == source or source in out.parents:
        raise ValueError(f"{out}: expected an output directory outside the source {source}: choose another one")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: expected a new or empty output directory, got a file: choose another name")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out}: expected a new or empty output directory, got one with files: choose another one")
    if out.is_mount():
        raise ValueError(f"{out}: a mount point cannot be replaced: choose a new directory inside it")
    existing = next(parent for parent in out.parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ValueError(
            f"{existing}: expected {format_bytes(needed_bytes)} of free disk space, got {format_bytes(free)}: "
            "free some, lower --bits or choose another output directory"
        )


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory beside ``out`` that becomes ``out`` when the block succeeds and is removed when it fails.

    Raises ValueError if it exists already: another process is writing it, or was killed.
    """
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(
            f"{partial}: exists already, so another run is writing it or was killed: "
            "wait for that run, or remove this directory and start again"
        ) from None
    try:
        yield partial
        _sync(partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(out.parent)


@one_thread()
def write_checkpoint(
    directory: Path, shards: Sequence[Shard], config: Mapping[str, Any], sidecars: Sequence[Path]
) -> None:
    """Write shards, index, copies of ``sidecars`` and, last, config.json; the bytes depend on the arguments alone."""
    total_size = sum(piece.nbytes for shard in shards for piece in shard.pieces)
    progress = Progress("write", total_size)
    for shard in shards:
        _write_shard(directory / shard.name, shard, progress)
    weight_map = {name: shard.name for shard in shards for name in shard.specs}
    for sidecar in sidecars:
        _write_file(directory / sidecar.name, sidecar.read_bytes())
    _write_json(directory / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    _write_json(directory / CONFIG, config)


def _write_shard(path: Path, shard: Shard, progress: Progress) -> None:
    """Write one file under a temporary name, so that its own name stands for a whole file."""
    header, offsets = layout(shard.specs)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        _write_at(file, 0, header)
        for piece in shard.pieces:
            tensors = piece.compute()
            for name, spec in piece.specs.items():
                tensor = tensors[name]
                if (tuple(tensor.shape), tensor.dtype) != (spec.shape, spec.dtype):
                    raise ValueError(f"{name}: expected {spec}, got {tensor.dtype} of shape {tuple(tensor.shape)}")
                _write_at(file, offsets[name], tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            progress.advance(piece.nbytes)
        os.fsync(file.fileno())
    temporary.rename(path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write_file(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        _write_at(file, 0, content)
        os.fsync(file.fileno())


def _write_at(file: BufferedWriter, offset: int, content: bytes | memoryview) -> None:
    try:
        file.seek(offset)
        file.write(content)
        file.flush()
    except OSError as error:
        way_out = "nothing was kept: make room or choose another output directory"
        raise OSError(error.errno, f"{error.strerror}: {way_out}", file.name) from error


def _sync(directory: Path) -> None:
    """Make the names in a directory as durable as the files' contents already are."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
