"""Writing a checkpoint: planned to the byte before it is computed, computed piece by piece.

The header of a shard depends only on names, shapes and dtypes, so it is written first and each tensor goes to its
place as soon as it exists, whichever process computes it: memory holds a few pieces at a time, whatever the size of a
shard, and nothing that is finished has to be done again after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from alphaq_vllm.format import TensorSpec
from offline.journal import sync
from offline.parallel import run_all
from offline.progress import Progress
from offline.source.beside import Sidecar
from offline.source.checkpoint import CONFIG, INDEX, Checkpoint
from offline.source.header import layout
from offline.source.stored import LazyTensor
from offline.writing.output import Output

DEFAULT_SHARD_BYTES = 4 * 2**30
COPY_BYTES = 2**24


@dataclass(frozen=True)
class Piece:
    """Tensors that are computed and stored together: their specs, and the function that computes them, if it is not
    somebody else who hands them to ``Writer.store``.

    The function can be pickled, and depends on nothing that another piece computes. A source's tensor that it returns
    is copied without ever being in memory as a whole.
    """

    specs: Mapping[str, TensorSpec]
    compute: Callable[[], Mapping[str, torch.Tensor | LazyTensor]] | None

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
    return Piece({name: source.spec(name)}, partial(_unchanged, source.tensors[name], name))


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


def small_files(
    shards: Sequence[Shard], config: Mapping[str, Any], sidecars: Sequence[Sidecar], extra: Mapping[str, str]
) -> dict[str, bytes]:
    """All files of a checkpoint but the shards, by name, in the order in which they are written: config.json last."""
    total_size = sum(piece.nbytes for shard in shards for piece in shard.pieces)
    weight_map = {name: shard.name for shard in shards for name in shard.specs}
    return {
        **{sidecar.name: sidecar.path.read_bytes() for sidecar in sidecars},
        **{name: text.encode() for name, text in extra.items()},
        INDEX: _json({"metadata": {"total_size": total_size}, "weight_map": weight_map}),
        CONFIG: _json(config),
    }


class Writer:
    """Writes shards and the other files of a checkpoint: index, copies of ``sidecars``, ``extra`` texts by name,
    config.json. What the journal of the output says is finished is kept.

    Raises ValueError if that belongs to another plan.
    """

    def __init__(
        self,
        output: Output,
        shards: Sequence[Shard],
        config: Mapping[str, Any],
        sidecars: Sequence[Sidecar],
        extra: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.output, self._shards = output, shards
        self._small = small_files(shards, config, sidecars, extra)
        _match_plan(output, shards, self._small)
        self._unfinished = _unfinished(output, shards)
        self._offsets: dict[int, Mapping[str, int]] = {}

    def store(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write pieces that somebody else has computed, all tensors of each; those that are finished stay as they are.

        The journal of the output has them from its next commit on.
        """
        for shard, number in sorted({self._places[name] for name in tensors}):
            if number in self._unfinished.get(shard, ()):
                task = self._task(shard, number)
                _write_tensors(task, tensors)
                self.output.journal.record({"written": [shard, number]}, task.path)
                self._unfinished[shard].remove(number)

    def write(self, workers: int = 1, shared: object = None) -> None:
        """Compute and write what is left; workers, shared: see ``run_all``, the bytes do not depend on them."""
        journal, shards = self.output.journal, self._shards
        total = sum(piece.nbytes for shard in shards for piece in shard.pieces)
        left = sum(shards[number].pieces[i].nbytes for number, pieces in self._unfinished.items() for i in pieces)
        tasks = run_all(_write_piece, self._tasks(), workers, shared)
        with Progress("write", total, total - left) as progress, closing(tasks) as finished:
            for task, _ in finished:
                journal.record({"written": [task.shard, task.number]}, task.path)
                progress.advance(task.piece.nbytes)
                self._unfinished[task.shard].remove(task.number)
                if not self._unfinished[task.shard]:
                    self._complete(task.shard)
        for name, content in self._small.items():
            path = self.output.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_file(path, content)

    def _complete(self, shard: int) -> None:
        """Give a file its name."""
        self.output.journal.commit()
        final = self.output.directory / self._shards[shard].name
        _temporary(final).rename(final)

    def _tasks(self) -> Iterator[_Task]:
        """What is left, in order."""
        for shard, numbers in list(self._unfinished.items()):
            if not numbers:
                self._complete(shard)
            for number in sorted(numbers):
                yield self._task(shard, number)

    def _task(self, shard: int, number: int) -> _Task:
        """A task, its file having been made for the first one that writes to it."""
        path = _temporary(self.output.directory / self._shards[shard].name)
        if shard not in self._offsets:
            header, self._offsets[shard] = layout(self._shards[shard].specs)
            path.touch()
            with path.open("r+b", buffering=0) as file:
                _write(file, header)
                file.truncate(self._shards[shard].nbytes)
            sync(self.output.directory)
        piece = self._shards[shard].pieces[number]
        return _Task(shard, number, piece, path, {name: self._offsets[shard][name] for name in piece.specs})

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """The numbers of the shard and of the piece of every tensor."""
        return {
            name: (shard, number)
            for shard, planned in enumerate(self._shards)
            for number, piece in enumerate(planned.pieces)
            for name in piece.specs
        }


@dataclass(frozen=True)
class _Task:
    """A piece to be computed, the number of its shard and its own in that, the file and its tensors' places there."""

    shard: int
    number: int
    piece: Piece
    path: Path
    offsets: Mapping[str, int]


def _match_plan(output: Output, shards: Sequence[Shard], small: Mapping[str, bytes]) -> None:
    """Raise ValueError if what is finished belongs to a plan for other bytes."""
    digest = hashlib.sha256(repr(([(shard.name, shard.specs) for shard in shards], small)).encode()).hexdigest()
    before = next((entry["plan"] for entry in output.journal.entries if "plan" in entry), None)
    if before is None:
        output.journal.record({"plan": digest})
        output.journal.commit()
    elif before != digest:
        raise ValueError(
            f"{output.directory.parent}: cannot be resumed: the run that left it planned other tensors or files: "
            "remove this directory to start again"
        )


def _unfinished(output: Output, shards: Sequence[Shard]) -> dict[int, set[int]]:
    """The pieces that are not finished, by shard; a whole one has none, until its file gets its final name."""
    written: dict[int, set[int]] = {}
    for entry in output.journal.entries:
        if "written" in entry:
            shard, piece = entry["written"]
            written.setdefault(shard, set()).add(piece)
    unfinished = {}
    for number, shard in enumerate(shards):
        final = output.directory / shard.name
        if final.exists():
            continue
        temporary = _temporary(final)
        if number in written and not temporary.exists():
            raise ValueError(f"{temporary}: expected the file that an interrupted run left, got none: start again")
        unfinished[number] = set(range(len(shard.pieces))) - written.get(number, set())
    return unfinished


def _write_piece(task: _Task) -> None:
    assert task.piece.compute, f"{', '.join(task.piece.specs)}: expected them to be stored before"
    _write_tensors(task, task.piece.compute())


def _write_tensors(task: _Task, tensors: Mapping[str, torch.Tensor | LazyTensor]) -> None:
    with task.path.open("r+b", buffering=0) as file:
        for name, spec in task.piece.specs.items():
            tensor = tensors[name]
            got = TensorSpec(tuple(tensor.shape), tensor.dtype) if isinstance(tensor, torch.Tensor) else tensor.spec
            if got != spec:
                raise ValueError(f"{name}: expected {spec}, got {got}")
            file.seek(task.offsets[name])
            for content in _contents(tensor):
                _write(file, content)


def _contents(tensor: torch.Tensor | LazyTensor) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor, a source's a part at a time."""
    if isinstance(tensor, torch.Tensor):
        yield tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data
    else:
        for chunk in tensor.chunks(COPY_BYTES):
            yield chunk.view(torch.uint8).numpy().data


def _unchanged(tensor: LazyTensor, name: str) -> dict[str, LazyTensor]:
    return {name: tensor}


def _temporary(final: Path) -> Path:
    return final.with_suffix(".tmp")


def _json(content: Mapping[str, Any]) -> bytes:
    # Halves of letters, which JSON can have and UTF-8 cannot, as the escapes that they were.
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        _write(file, content)
        os.fsync(file.fileno())


def _write(file: FileIO, content: bytes | memoryview) -> None:
    """Write all, where one call may write only a part."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(file.fileno(), rest) :]
