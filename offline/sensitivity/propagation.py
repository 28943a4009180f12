"""How much of a matrix's error arrives at the output of its layer, without calibration data.

The model runs on text that it writes itself (see ``write_text``). That shows how often an expert is called upon, with
what weight, and what its gate, up and down make of an error: what spectra cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offline.journal import Journal
from offline.model.decoder import Decoder
from offline.model.formula import Formula
from offline.model.forward import forward
from offline.model.layer import Layer, Routes
from offline.model.passes import Pass
from offline.model.text import write_text
from offline.parallel import run_all
from offline.quantizers.quantize import quantize
from offline.source.checkpoint import Checkpoint
from offline.source.families import ExpertMatrix, Experts, load_weight
from offline.threads import one_thread

TOKENS, LENGTH = 4096, 512
# What stands for any quantization error: quick to make, and as uneven over a matrix as all of them.
NUM_BITS, QUANTIZER = 4, "rtn"
# An expert that no token reached still counts this much of its layer's mean: there is text that calls on it.
FLOOR = 0.01


@dataclass(frozen=True, eq=False)
class _Task:
    """The arguments of ``expert_gains`` for one expert, and its number."""

    number: int
    source: Checkpoint
    expert: Sequence[ExpertMatrix]
    inputs: Tensor
    topk_weights: Tensor
    formula: Formula
    group_size: int
    back: Tensor | None


@one_thread()
def error_gains(
    source: Checkpoint,
    experts: Experts,
    group_size: int,
    workers: int = 1,
    text: Callable[[], Tensor] | None = None,
    journal: Journal | None = None,
) -> dict[str, float]:
    """By matrix name, the squared error of its layer's output that a mean squared error of 1 in its weights causes,
    relative to the square of that output.

    experts: all of the source's; workers: threads and processes to use, which changes no figure; text: what
    ``write_text`` writes for ``TOKENS`` in windows of ``LENGTH`` or more of them, if somebody writes it anyway;
    journal: where the figures of a layer are kept, and found again.
    Raises ValueError as ``Decoder`` does.
    """
    decoder = Decoder(source, experts)
    gains: dict[str, float] = {}
    for entry in journal.entries if journal else []:
        gains.update(entry.get("gains", {}))
    run = Pass(decoder, "propagate", journal)
    if run.finished:
        return gains
    windows = text() if text else write_text(decoder, source, experts, TOKENS, LENGTH, workers, journal)
    windows = windows[: TOKENS // windows.shape[1]]

    def observe(layer: Layer, matrices: Sequence[Sequence[ExpertMatrix]], routes: Routes, output: Tensor) -> None:
        energy = float(output.double().square().sum())
        if not energy:
            raise ValueError(
                f"{source.path}: expected layers that compute something from the text that the model writes, got zeros "
                f"from that of {matrices[0][0].module}: compare its files with the original, or use `noise=expert` and "
                "`quantizer=mse`"
            )
        tasks = _tasks(source, matrices, routes, group_size)
        errors = {task.number: squared for task, squared in run_all(_gains, tasks, workers, shared=source)}
        found = {
            matrix.name: error / energy
            for number, expert in enumerate(matrices)
            for matrix, error in zip(expert, errors[number], strict=True)
        }
        least = FLOOR * sum(found.values()) / len(found)
        found = {name: max(gain, least) for name, gain in found.items()}
        gains.update(found)
        if journal:
            journal.record({"gains": found})

    forward(decoder, source, experts, windows, "propagate", observe, workers, run)
    run.finish()
    return gains


def _tasks(
    source: Checkpoint,
    matrices: Sequence[Sequence[ExpertMatrix]],
    routes: Routes,
    group_size: int,
) -> Iterator[_Task]:
    for number, expert in enumerate(matrices):
        tokens, topk_weights = routes.of(number)
        inputs, formula = routes.inputs[tokens], routes.formula.of(number)
        yield _Task(number, source, expert, inputs, topk_weights, formula, group_size, routes.back)


def _gains(task: _Task) -> list[float]:
    return expert_gains(
        task.source, task.expert, task.inputs, task.topk_weights, task.formula, task.group_size, task.back
    )


@torch.no_grad()
def expert_gains(
    source: Checkpoint,
    expert: Sequence[ExpertMatrix],
    inputs: Tensor,
    topk_weights: Tensor,
    formula: Formula,
    group_size: int,
    back: Tensor | None = None,
) -> list[float]:
    """The squared error of an expert's weighted outputs that a mean squared error of 1 in each of its matrices causes.

    inputs: ``[tokens, features]`` float32; topk_weights: ``[tokens]``; formula: how it computes; back: of ``Routes``.
    """
    if not len(inputs):
        return [0.0] * len(expert)
    weights = [load_weight(source, matrix) for matrix in expert]
    *first, down = weights
    states = formula.states(inputs, first)
    inner = formula.activate(states)

    def error(place: int, weight: Tensor, changed: Tensor) -> Tensor:
        if place == len(states):
            return inner @ (changed - weight).T
        others = [*states[:place], formula.state(inputs, changed, place), *states[place + 1 :]]
        return (formula.activate(others) - inner) @ down.T

    gains = []
    for place, weight in enumerate(weights):
        quantized = quantize(weight, NUM_BITS, group_size, QUANTIZER)
        outputs = error(place, weight, quantized.dequantize(NUM_BITS)) * topk_weights[:, None]
        squared = float((outputs if back is None else outputs @ back.T).double().square().sum())
        gains.append(squared / quantized.mse if quantized.mse else 0.0)
    return gains
