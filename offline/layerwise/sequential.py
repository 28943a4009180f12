"""GPTQ of all experts of a model, layer by layer, each on what reaches it through the quantized layers before it.

Memory holds the activations of the calibration text, one layer without its experts, and one expert at a time. What is
quantized is handed on at once. An interrupted run begins again with the layer that it was at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from offline.journal import Journal
from offline.model.decoder import Decoder
from offline.model.formula import Formula
from offline.model.forward import run_experts
from offline.model.layer import Layer, Outputs, Routes, advance, route
from offline.model.passes import Pass
from offline.model.text import Calibration, default_tokens, read_windows, write_text
from offline.parallel import run_all
from offline.quantizers.drift import drift, pull
from offline.quantizers.gptq import blocks, feedback, gptq
from offline.quantizers.quantize import Quantized, quantize, scales_of
from offline.source.checkpoint import Checkpoint
from offline.source.families import ExpertMatrix, Experts, load_weight, matrix_nbytes
from offline.threads import compute_device, one_thread, release_memory

Store = Callable[[Mapping[str, Tensor]], None]


@dataclass(frozen=True, eq=False)
class _Layer:
    """What all tasks of a layer share."""

    source: Checkpoint
    routes: Routes
    group_size: int


@dataclass(frozen=True)
class _Task:
    """One expert to quantize: its number, its matrices (gate, up, down, or up, down) with their widths; outputs:
    whether what comes out of it is wanted.
    """

    layer: _Layer
    number: int
    bits: Mapping[ExpertMatrix, int]
    outputs: bool


class SequentialGptq:
    """GPTQ of a model's experts. What is wrong with the model or the text shows when this is made.

    experts: all of the source's, also those that are to be left alone.
    Raises ValueError or OSError as ``Decoder`` and ``read_windows`` do.
    """

    def __init__(self, source: Checkpoint, experts: Experts, calibration: Calibration) -> None:
        self._source, self._experts = source, experts
        self.decoder = Decoder(source, experts)
        self.length = calibration.length
        wanted = calibration.tokens or default_tokens(source, experts, calibration.times)
        self._max_tokens = max(calibration.length, wanted)
        self._text = read_windows(source, calibration, self._max_tokens) if calibration.files else None
        self._written: Tensor | None = None

    @property
    def own_text(self) -> bool:
        """Whether the model writes the calibration text itself."""
        return self._text is None

    @property
    def tokens(self) -> int:
        """Number of tokens of calibration text."""
        if self._text is not None:
            return self._text.numel()
        length = min(self.length, self.decoder.context)
        return self._max_tokens // length * length

    def writes(self, tokens: int, length: int) -> bool:
        """Whether ``text`` begins with what ``write_text`` writes for so many tokens in windows of ``length``."""
        return self.own_text and self.length == length and self._max_tokens >= tokens

    @property
    def digest(self) -> str:
        """What tells one calibration from another."""
        text = (self.length, self._max_tokens) if self._text is None else self._text.tolist()
        return hashlib.sha256(repr(text).encode()).hexdigest()

    def text(self, workers: int = 1, journal: Journal | None = None) -> Tensor:
        """The calibration text, ``[windows, length]`` token ids; workers, journal: see ``write_text``."""
        if self._text is not None:
            return self._text
        if self._written is None:
            some = (self._max_tokens, self.length, workers, journal)
            self._written = write_text(self.decoder, self._source, self._experts, *some)
        return self._written

    @one_thread()
    def run(
        self,
        widths: Mapping[str, int],
        group_size: int,
        store: Store,
        workers: int = 1,
        journal: Journal | None = None,
    ) -> int:
        """Quantize experts.

        widths: by matrix name, for whole modules; store: what takes the stored tensors of an expert, by their names, on
        the CPU, those of an interrupted layer again; workers: processes to use, which changes no result; journal: see
        ``Pass``.
        Returns the number of experts that no token reached, which are quantized without data.
        """
        pass_ = Pass(self.decoder, "gptq", journal)
        entries = journal.entries if journal else []
        starved = {entry["gptq"]: entry["starved"] for entry in entries if "gptq" in entry}
        if pass_.finished:
            return sum(starved.values())
        hidden = pass_.begin(self._source, self.text(workers, journal))
        with pass_.progress("gptq", self._source, self._experts) as progress:
            for layer in pass_.layers(hidden):
                without_tokens = self._take(layer, hidden, widths, group_size, store, workers)
                if (module := layer.source_experts) is None:
                    continue
                if without_tokens is not None:
                    starved[module] = without_tokens
                    if journal:
                        journal.record({"gptq": module, "starved": without_tokens})
                matrices = (matrix for expert in self._experts.of(module) for matrix in expert)
                progress.advance(sum(matrix_nbytes(self._source, matrix) for matrix in matrices))
        pass_.finish()
        return sum(starved.values())

    def _take(
        self, layer: Layer, hidden: Tensor, widths: Mapping[str, int], group_size: int, store: Store, workers: int
    ) -> int | None:
        """Take activations through a layer, and quantize its experts if they have widths.

        Returns the number of those that no token reached, None for a layer without experts to quantize. Nothing that is
        as large as the activations is left when the next layer begins.
        """
        with layer.loaded(self._source, compute_device()):
            if layer.source_experts is None:
                advance(layer, hidden, workers)
                return None
            routes = route(layer, hidden, workers)
        experts = self._experts.of(layer.source_experts)
        # Nothing comes after the last layer.
        last = layer is self.decoder.layers[-1]
        outputs = None if last else Outputs(layer, hidden, routes)
        starved = None
        if experts[0][0].name in widths:
            # What the layer has to run again with is of no use to an expert.
            shared = _Layer(self._source, replace(routes, before=None), group_size)
            bits = [{matrix: widths[matrix.name] for matrix in expert} for expert in experts]
            tasks = (_Task(shared, number, chosen, not last) for number, chosen in enumerate(bits))
            _run(tasks, store, outputs, workers, shared)
            starved = sum(not len(routes.of(expert)[0]) for expert in range(len(experts)))
        elif outputs:
            run_experts(experts, partial(load_weight, self._source), routes, outputs, workers)
        if outputs:
            outputs.finish(self._source, workers)
        return starved


def _run(tasks: Iterable[_Task], store: Store, outputs: Outputs | None, workers: int, layer: _Layer) -> None:
    """Quantize a layer's experts, and add what comes out of the quantized ones, if that is wanted."""
    # Results come in any order, and are added in one.
    waiting: dict[int, Tensor] = {}
    added = 0
    for task, (tensors, output) in run_all(_quantize, tasks, workers, shared=layer):
        store({name: tensor.cpu() for name, tensor in tensors.items()})
        release_memory()
        if output is None or outputs is None:
            continue
        waiting[task.number] = output
        while added in waiting:
            outputs.add(added, waiting.pop(added))
            added += 1


def _quantize(task: _Task) -> tuple[dict[str, Tensor], Tensor | None]:
    layer, routes = task.layer, task.layer.routes
    tokens, topk_weights = routes.of(task.number)
    inputs, formula = routes.inputs[tokens], routes.formula.of(task.number)
    return _quantize_expert(layer.source, task.bits, layer.group_size, formula, inputs, topk_weights, task.outputs)


@torch.no_grad()
def _quantize_expert(
    source: Checkpoint,
    bits: Mapping[ExpertMatrix, int],
    group_size: int,
    formula: Formula,
    inputs: Tensor,
    topk_weights: Tensor,
    outputs: bool,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The stored tensors of an expert's matrices, and what comes out of these, if it is wanted.

    Down is fitted to what comes out of the quantized ones before it, to make of it what it made of the originals'.

    inputs: ``[tokens, features]`` float32, those that are routed to it, with their weights.
    """
    if not len(inputs):
        plain = {matrix: quantize(load_weight(source, matrix), width, group_size) for matrix, width in bits.items()}
        return _stored(plain), inputs if outputs else None

    *first, down = bits
    # Their squares are what errors of the layer's output have, but then few tokens would decide.
    counts = topk_weights.abs()
    back = feedback(inputs, group_size, counts)
    done = {matrix: gptq(load_weight(source, matrix), back, bits[matrix], group_size) for matrix in first}
    del back
    inner = formula.inner(inputs, [done[matrix].dequantize(bits[matrix]) for matrix in first])
    drifted = _drift_inside(source, first, formula, inputs, inner, counts)
    # What is largest comes now.
    release_memory()
    done[down] = _quantize_down(load_weight(source, down), bits[down], group_size, inner, counts, drifted)
    if not outputs:
        return _stored(done), None
    return _stored(done), formula.project(inner, done[down].dequantize(bits[down]), topk_weights)


def _quantize_down(
    weight: Tensor, num_bits: int, group_size: int, inner: Tensor, counts: Tensor, drifted: Tensor
) -> Quantized:
    """Down, one of ``blocks`` of its columns after the other; drifted: of ``drift``."""
    scales, parts = scales_of(weight, num_bits, group_size), []
    for columns in blocks(len(inner), weight.shape[1], group_size):
        back, some = feedback(inner[:, columns], group_size, counts), weight[:, columns]
        moved = pull(some, back, drifted[columns])
        parts.append(gptq(some, back, num_bits, group_size, pull=moved, scales=scales))
        # Before the next is made.
        del back, moved
    return Quantized.joined(parts)


def _drift_inside(
    source: Checkpoint, first: Sequence[ExpertMatrix], formula: Formula, inputs: Tensor, inner: Tensor, counts: Tensor
) -> Tensor:
    """The ``drift`` of what an expert's first matrices give down, now ``inner``."""
    weights = [load_weight(source, matrix) for matrix in first]
    return drift(inner, lambda some: formula.inner(inputs[some], weights), counts)


def _stored(done: Mapping[ExpertMatrix, Quantized]) -> dict[str, Tensor]:
    return {name: tensor for matrix, one in done.items() for name, tensor in one.tensors(matrix.name).items()}
