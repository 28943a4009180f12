"""Running a whole model on some tokens, with one layer and one expert in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from offline.model.decoder import Decoder, Layer, Routes, advance, route
from offline.progress import Progress
from offline.source.checkpoint import Checkpoint
from offline.source.families import ExpertMatrix, Experts, load_weight, matrix_nbytes
from offline.threads import compute_device, one_thread

# Called after a layer with experts: the layer, its matrices by expert, what reached them, and the layer's output.
Observe = Callable[[Layer, Sequence[Sequence[ExpertMatrix]], Routes, Tensor], None]


@one_thread()
def forward(
    decoder: Decoder, source: Checkpoint, experts: Experts, windows: Tensor, what: str, observe: Observe | None = None
) -> Tensor:
    """The output of the last layer, ``[windows, length, hidden_size]`` float32, for token ids ``windows``.

    experts: all of the source's; what: the name of the progress.
    """
    device = compute_device()
    hidden = decoder.embed(source, windows, device)
    load = partial(load_weight, source)
    with Progress(what, sum(matrix_nbytes(source, matrix) for matrix in experts.matrices)) as progress:
        for layer in decoder.layers:
            with layer.loaded(source, device):
                if layer.source_experts is None:
                    advance(layer, hidden, None)
                    continue
                matrices, routes = by_expert(experts, layer.source_experts), route(layer, hidden)
                advance(layer, hidden, expert_outputs(matrices, load, routes, layer.activation))
            if observe:
                observe(layer, matrices, routes, hidden)
            progress.advance(sum(matrix_nbytes(source, matrix) for expert in matrices for matrix in expert))
    return hidden


def by_expert(experts: Experts, module: str) -> list[list[ExpertMatrix]]:
    """The matrices of each expert of a module, in order: gate, up and down, or up and down."""
    found: dict[int, list[ExpertMatrix]] = {}
    for matrix in experts.matrices:
        if matrix.module == module:
            found.setdefault(matrix.expert, []).append(matrix)
    return list(found.values())


def expert_outputs(
    experts: Sequence[Sequence[ExpertMatrix]],
    load: Callable[[ExpertMatrix], Tensor],
    routes: Routes,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """What comes out of the experts, ``[tokens, hidden_size]``, added in the same order on every run."""
    outputs = torch.zeros_like(routes.inputs)
    for number, expert in enumerate(experts):
        tokens, topk_weights = routes.of(number)
        inputs = routes.inputs[tokens]
        *first, down = (load(matrix) for matrix in expert)
        inner = activated(inputs, first, activation)
        outputs.index_add_(0, tokens, inner @ down.T * topk_weights[:, None])
    return outputs


def activated(inputs: Tensor, first: Sequence[Tensor], activation: Callable[[Tensor], Tensor]) -> Tensor:
    """What an expert's down multiplies, ``[tokens, intermediate_size]``; first: gate and up, or up alone."""
    inner = activation(inputs @ first[0].T)
    return inner if len(first) == 1 else inner * (inputs @ first[1].T)
