"""GPTQ of all experts of a model, layer by layer, each on what reaches it through the quantized layers before it.

Memory holds the activations of the calibration text, one layer without its experts, and one expert at a time. The
results of a layer go to a file as soon as they are complete, so that an interrupted run goes on after the last file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alphaq_vllm import packing
from alphaq_vllm.format import PACKED, SCALE, ZERO
from offline.journal import Journal, sync
from offline.model.decoder import Decoder
from offline.model.formula import Formula
from offline.model.forward import expert_outputs
from offline.model.layer import Routes, add_outputs, advance, route
from offline.model.passes import Pass
from offline.model.text import Calibration, default_tokens, read_windows, write_text
from offline.parallel import run_all
from offline.quantizers.gptq import gptq, inverse_factor
from offline.quantizers.quantize import quantize
from offline.source.checkpoint import Checkpoint
from offline.source.families import ExpertMatrix, Experts, load_weight, matrix_nbytes
from offline.threads import compute_device, one_thread


@dataclass(frozen=True)
class _Task:
    """One expert to quantize: its number, its matrices (gate, up, down, or up, down) with their widths, its formula,
    and the inputs that are routed to it, ``[tokens, hidden_size]`` float32, with their weights;
    outputs: whether what comes out of it is wanted.
    """

    number: int
    source: Checkpoint
    bits: Mapping[ExpertMatrix, int]
    group_size: int
    formula: Formula
    inputs: Tensor
    topk_weights: Tensor
    outputs: bool = False


class SequentialGptq:
    """GPTQ of a model's experts. What is wrong with the model or the text shows when this is made.

    experts: all of the source's, also those that are to be left alone.
    Raises ValueError or OSError as ``Decoder`` and ``read_windows`` do.
    """

    def __init__(self, source: Checkpoint, experts: Experts, calibration: Calibration) -> None:
        self._source, self._experts = source, experts
        self.decoder = Decoder(source, experts)
        self.length = calibration.length
        self._max_tokens = calibration.tokens or max(calibration.length, default_tokens(source, experts))
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
        directory: Path,
        workers: int = 1,
        journal: Journal | None = None,
    ) -> int:
        """Quantize experts into files of ``directory``, from which ``load_quantized`` reads them.

        widths: by matrix name, for whole modules; directory: made if absent, and used as far as an interrupted run has
        filled it; workers: processes to use, which changes no result; journal: see ``Pass``.
        Returns the number of experts that no token reached, which are quantized without data.
        """
        directory.mkdir(exist_ok=True)
        device, pass_ = compute_device(), Pass(self.decoder, "gptq", journal)
        entries = journal.entries if journal else []
        starved = {entry["gptq"]: entry["starved"] for entry in entries if "gptq" in entry}
        if pass_.finished:
            return sum(starved.values())
        hidden = pass_.begin(self._source, self.text(workers, journal))
        with pass_.progress("gptq", self._source, self._experts) as progress:
            for layer in pass_.layers(hidden):
                with layer.loaded(self._source, device):
                    if layer.source_experts is None:
                        advance(layer, hidden, workers)
                        continue
                    routes = route(layer, hidden, workers)
                experts = self._experts.of(layer.source_experts)
                # Nothing comes after the last layer.
                last = layer is self.decoder.layers[-1]
                load: Callable[[ExpertMatrix], Tensor] = partial(load_weight, self._source)
                outputs = None
                if experts[0][0].name in widths:
                    path = _path(directory, layer.source_experts)
                    if not path.exists():
                        tasks = self._tasks(experts, widths, group_size, routes, not last)
                        tensors, outputs = _run(tasks, routes, workers, self._source)
                        _write(path, tensors)
                    load = partial(_restore, directory, widths)
                    module = layer.source_experts
                    starved[module] = sum(not len(routes.of(expert)[0]) for expert in range(len(experts)))
                    if journal:
                        journal.record({"gptq": module, "starved": starved[module]})
                if not last:
                    if outputs is None:
                        outputs = expert_outputs(experts, load, routes, workers)
                    add_outputs(layer, hidden, outputs, routes, self._source, workers)
                progress.advance(sum(matrix_nbytes(self._source, matrix) for expert in experts for matrix in expert))
        pass_.finish()
        return sum(starved.values())

    def quantize_expert(self, num_bits: int, group_size: int, inputs: Tensor, topk_weights: Tensor) -> None:
        """Quantize the first expert for the time that it takes; inputs, topk_weights: of tokens as if routed to it."""
        bits = dict.fromkeys(self._experts.of(self._experts.modules[0])[0], num_bits)
        formula = Formula(torch.nn.functional.silu)
        _quantize(_Task(0, self._source, bits, group_size, formula, inputs, topk_weights, outputs=True))

    def _tasks(
        self,
        experts: Sequence[Sequence[ExpertMatrix]],
        widths: Mapping[str, int],
        group_size: int,
        routes: Routes,
        outputs: bool,
    ) -> Iterator[_Task]:
        for number, expert in enumerate(experts):
            bits = {matrix: widths[matrix.name] for matrix in expert}
            tokens, topk_weights = routes.of(number)
            inputs, formula = routes.inputs[tokens], routes.formula.of(number)
            yield _Task(number, self._source, bits, group_size, formula, inputs, topk_weights, outputs)


def load_quantized(directory: Path, matrix: ExpertMatrix) -> dict[str, Tensor]:
    """The stored tensors of a matrix, by their names, from the files of ``SequentialGptq.run``."""
    with safe_open(_path(directory, matrix.module), "pt") as file:
        return {name: file.get_tensor(name) for name in _names(matrix)}


def _run(
    tasks: Iterable[_Task], routes: Routes, workers: int, source: Checkpoint
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The stored tensors of a layer's experts, on the CPU, and what comes out of them if that is wanted, as of
    ``expert_outputs`` with the quantized matrices.
    """
    stored: dict[str, Tensor] = {}
    outputs: Tensor | None = None
    # Results come in any order, and are added in one.
    waiting: dict[int, Tensor] = {}
    added = 0
    for task, (tensors, output) in run_all(_quantize, tasks, workers, shared=source):
        stored |= {name: tensor.cpu() for name, tensor in tensors.items()}
        if output is None:
            continue
        outputs = torch.zeros_like(routes.inputs) if outputs is None else outputs
        waiting[task.number] = output
        while added in waiting:
            outputs.index_add_(0, routes.of(added)[0], waiting.pop(added))
            added += 1
    return stored, outputs


@torch.no_grad()
def _quantize(task: _Task) -> tuple[dict[str, Tensor], Tensor | None]:
    """The stored tensors of an expert's matrices, down fitted to what comes out of the quantized ones before it; and
    what comes out of all, if it is wanted.
    """
    *first, down = task.bits
    if not len(task.inputs):
        tensors = {name: tensor for matrix in task.bits for name, tensor in _data_free(task, matrix).items()}
        return tensors, task.inputs if task.outputs else None
    factor = inverse_factor(task.inputs)
    tensors = {name: tensor for matrix in first for name, tensor in _gptq(task, matrix, factor).items()}
    del factor
    weights = [_weight(tensors, matrix, task.bits[matrix]) for matrix in first]
    inner = task.formula.inner(task.inputs, weights)
    tensors |= _gptq(task, down, inverse_factor(inner))
    if not task.outputs:
        return tensors, None
    return tensors, task.formula.project(inner, _weight(tensors, down, task.bits[down]), task.topk_weights)


def _data_free(task: _Task, matrix: ExpertMatrix) -> dict[str, Tensor]:
    return quantize(load_weight(task.source, matrix), task.bits[matrix], task.group_size).tensors(matrix.name)


def _gptq(task: _Task, matrix: ExpertMatrix, factor: Tensor) -> dict[str, Tensor]:
    return gptq(load_weight(task.source, matrix), factor, task.bits[matrix], task.group_size).tensors(matrix.name)


def _restore(directory: Path, widths: Mapping[str, int], matrix: ExpertMatrix) -> Tensor:
    tensors = {name: tensor.to(compute_device()) for name, tensor in load_quantized(directory, matrix).items()}
    return _weight(tensors, matrix, widths[matrix.name])


def _weight(tensors: Mapping[str, Tensor], matrix: ExpertMatrix, num_bits: int) -> Tensor:
    packed, scale, zero_point = (tensors[name] for name in _names(matrix))
    return packing.dequantize(packed, scale, zero_point, num_bits)


def _names(matrix: ExpertMatrix) -> list[str]:
    return [f"{matrix.name}.{suffix}" for suffix in (PACKED, SCALE, ZERO)]


def _path(directory: Path, module: str) -> Path:
    return directory / f"{module}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file whose name stands for a complete one. Raises OSError, as for a full disk."""
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary)
    except SafetensorError as error:
        # All that it tells of the system's error is a text.
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(temporary)) from error
    sync(temporary)
    temporary.rename(path)
    sync(path.parent)
