"""A pass of some text through the layers of a model, which a kill sets back by one layer at most.

After every layer the journal says how far the pass is, and a file beside it holds what enters the next layer. Running
the layers before it again would give the same, but would read all their experts again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from offline.journal import KEPT, Journal, sync
from offline.model.decoder import Decoder
from offline.model.handed import keep, restored
from offline.model.layer import Layer
from offline.progress import Progress
from offline.source.checkpoint import Checkpoint
from offline.source.families import Experts, matrix_nbytes
from offline.threads import compute_device

# The file beside what enters a layer, for what the layer before has handed to it otherwise.
_HANDED = ".handed"


class Pass:
    """A pass through all layers, from where an interrupted one has stopped.

    name: what tells it from other passes of the same work; journal: where it is kept, None to keep nothing; output:
    whether what comes out of the last layer is kept too, until the pass is finished; ``done``: the number of layers
    that are behind it; ``finished``: whether nothing of it is needed any more.
    """

    def __init__(self, decoder: Decoder, name: str, journal: Journal | None = None, output: bool = False) -> None:
        self._decoder, self.name, self._journal, self._output = decoder, name, journal, output
        entries = [entry for entry in journal.entries if entry.get("pass") == name] if journal else []
        self.done: int = entries[-1]["layers"] if entries else 0
        self.finished: bool = bool(entries) and entries[-1]["finished"]

    def progress(self, what: str, source: Checkpoint, experts: Experts) -> Progress:
        """Progress in bytes of experts, those behind the pass included; experts: all of the source's."""
        behind = {layer.source_experts for layer in self._decoder.layers[: self.done]}
        sizes = [(matrix.module in behind, matrix_nbytes(source, matrix)) for matrix in experts.matrices]
        return Progress(what, sum(size for _, size in sizes), sum(size for passed, size in sizes if passed))

    def begin(self, source: Checkpoint, windows: Tensor) -> Tensor:
        """What enters the first layer of ``layers``, as of ``Decoder.embed``: ``[windows, length, hidden_size]``."""
        hidden = self._decoder.embed(source, windows, compute_device())
        if path := self._kept:
            hidden.copy_(torch.from_file(str(path), size=hidden.numel(), dtype=hidden.dtype).view_as(hidden))
            if (layer := self._next) and layer.takes:
                layer.handed = restored(path.with_suffix(_HANDED), len(hidden), layer.takes, hidden.device)
        return hidden

    def layers(self, hidden: Tensor) -> Iterator[Layer]:
        """The layers that are left. Each has to replace ``hidden``, its input, by its output before the next."""
        for layer in self._decoder.layers[self.done :]:
            yield layer
            layer.handed = {}
            if self._output or self.done + 1 < len(self._decoder.layers):
                self._advance(hidden)

    def finish(self) -> None:
        """Keep for good that all is done, with what was recorded in the journal before, and no more activations."""
        self.done, self.finished = len(self._decoder.layers), True
        self._commit()

    def _advance(self, hidden: Tensor) -> None:
        self.done += 1
        if path := self._kept:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(hidden.cpu().numpy().data)
            if (layer := self._next) and layer.takes:
                keep(layer.handed, path.with_suffix(_HANDED))
                sync(path.with_suffix(_HANDED))
            for directory in path.parents[:2]:
                sync(directory)
        self._commit()

    def _commit(self) -> None:
        if self._journal is None:
            return
        entry = {"pass": self.name, "layers": self.done, "finished": self.finished}
        self._journal.record(entry, self._kept)
        self._journal.commit()
        # Also what kills have left of layers and passes before.
        kept = self._kept
        for path in self._journal.path.with_name(KEPT).glob("*"):
            if kept is None or path.stem != kept.stem:
                path.unlink()

    @property
    def _next(self) -> Layer | None:
        """The layer that what is kept enters, if it is not the output of the last."""
        return next(iter(self._decoder.layers[self.done :]), None)

    @property
    def _kept(self) -> Path | None:
        """What enters the next layer, if that is kept."""
        if self._journal is None or self.finished or not self.done:
            return None
        return self._journal.path.with_name(KEPT) / f"{self.name}-{self.done}.float32"


def kept_nbytes(decoder: Decoder, source: Checkpoint, tokens: int, length: int) -> int:
    """Bytes on disk that a pass of so many tokens, in windows of ``length``, takes at most: what enters one layer and,
    for a moment, the next.
    """
    length = min(length, decoder.context)
    handed = decoder.rehearse(source, length) if decoder.hands_on else 0
    return 2 * (tokens * decoder.hidden_size * torch.float32.itemsize + math.ceil(tokens / length) * handed)


def passed(journal: Journal | None, phase: str, layers: int) -> float:
    """How many passes are done whose names begin with ``phase``, a part of one counted by its share of the layers."""
    entries = journal.entries if journal else []
    reached = {entry["pass"]: entry["layers"] for entry in entries if "pass" in entry}
    return sum(done / layers for name, done in reached.items() if name.startswith(phase))
