"""A pass of some text through the layers of a model, which a kill sets back by one layer at most.

After every layer the journal says how far the pass is, and a file beside it holds what enters the next layer. Running
the layers before it again would give the same, but would read all their experts again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from offline.journal import KEPT, Journal, sync
from offline.model.decoder import Decoder
from offline.model.layer import Layer
from offline.progress import Progress
from offline.source.checkpoint import Checkpoint
from offline.source.families import Experts, matrix_nbytes
from offline.threads import compute_device


class Pass:
    """A pass through all layers, from where an interrupted one has stopped.

    name: what tells it from other passes of the same work; journal: where it is kept, None to keep nothing;
    ``done``: the number of layers that are behind it.
    """

    def __init__(self, decoder: Decoder, name: str, journal: Journal | None = None) -> None:
        self._decoder, self.name, self._journal = decoder, name, journal
        self._directory = journal.path.with_name(KEPT) if journal else None
        reached = [entry["layers"] for entry in journal.entries if entry.get("pass") == name] if journal else []
        self.done: int = reached[-1] if reached else 0

    @property
    def finished(self) -> bool:
        """Whether nothing of it is left to do."""
        return self.done == len(self._decoder.layers)

    def progress(self, what: str, source: Checkpoint, experts: Experts) -> Progress:
        """Progress in bytes of experts, those behind the pass included; experts: all of the source's."""
        behind = {layer.source_experts for layer in self._decoder.layers[: self.done]}
        sizes = [(matrix.module in behind, matrix_nbytes(source, matrix)) for matrix in experts.matrices]
        return Progress(what, sum(size for _, size in sizes), sum(size for passed, size in sizes if passed))

    def begin(self, source: Checkpoint, windows: Tensor) -> Tensor:
        """What enters the first layer of ``layers``, as of ``Decoder.embed``: ``[windows, length, hidden_size]``."""
        hidden = self._decoder.embed(source, windows, compute_device())
        if self.done:
            kept = torch.from_file(str(self._file(self.done)), size=hidden.numel(), dtype=hidden.dtype)
            hidden.copy_(kept.view_as(hidden))
        return hidden

    def layers(self, hidden: Tensor) -> Iterator[Layer]:
        """The layers that are left. Each has to replace ``hidden``, its input, by its output before the next."""
        for layer in self._decoder.layers[self.done :]:
            yield layer
            # What comes out of the last one is for somebody else, who may not be done with it.
            if self.done + 1 < len(self._decoder.layers):
                self._advance(hidden)

    def finish(self) -> None:
        """Keep for good that all is done, with what was recorded in the journal before, and no more activations."""
        if self._journal and not self.finished:
            before, self.done = self.done, len(self._decoder.layers)
            self._commit(self._journal, None)
            self._remove(before)

    def _advance(self, hidden: Tensor) -> None:
        before, self.done = self.done, self.done + 1
        if self._journal and self._directory:
            self._directory.mkdir(exist_ok=True)
            path = self._file(self.done)
            path.write_bytes(hidden.cpu().numpy().data)
            for directory in (self._directory, self._directory.parent):
                sync(directory)
            self._commit(self._journal, path)
            self._remove(before)

    def _commit(self, journal: Journal, path: Path | None) -> None:
        journal.record({"pass": self.name, "layers": self.done}, path)
        journal.commit()

    def _remove(self, layers: int) -> None:
        if layers:
            self._file(layers).unlink(missing_ok=True)

    def _file(self, layers: int) -> Path:
        assert self._directory, "only a journal tells of layers that are done"
        return self._directory / f"{self.name}-{layers}.float32"


def kept_nbytes(tokens: int, hidden_size: int) -> int:
    """Bytes on disk that a pass of so many tokens takes at most: what enters one layer and, for a moment, the next."""
    return 2 * tokens * hidden_size * torch.float32.itemsize


def passed(journal: Journal | None, phase: str, layers: int) -> float:
    """How many passes are done whose names begin with ``phase``, a part of one counted by its share of the layers."""
    entries = journal.entries if journal else []
    reached = {entry["pass"]: entry["layers"] for entry in entries if "pass" in entry}
    return sum(done / layers for name, done in reached.items() if name.startswith(phase))
