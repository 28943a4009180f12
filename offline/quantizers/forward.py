"""Running a whole model on some tokens, with one layer and one expert in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from offline.allocation.measure import load_weight
from offline.progress import Progress
from offline.quantizers.decoder import Decoder, Layer, Routes, advance, route
from offline.source.checkpoint import Checkpoint
from offline.source.families import ExpertMatrix, Experts, matrix_nbytes
from offline.threads import compute_device, one_thread

# Called after a layer with experts: the layer, its matrices by expert, what reached them, and the layer's output.
Observe = Callable[[Layer, Sequence[Sequence[ExpertMatrix]], Routes, Tensor], None]

# The passes of ``write_text``, and its seed.
PASSES, SEED = 2, 0


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


def write_text(decoder: Decoder, source: Checkpoint, experts: Experts, tokens: int, length: int) -> Tensor:
    """Text of the model's own, for what needs text where the user has none: ``[windows, length]`` token ids.

    It starts from random tokens. Each pass runs the model once and replaces every token by one that the model predicts
    after those before it, all places at once. That is not the text that it would write word by word, which would take a
    pass for every word, but its tokens are as frequent and call on the experts as often as in real text.
    """
    length = min(length, decoder.context)
    generator = torch.Generator().manual_seed(SEED)
    windows = torch.randint(decoder.vocab_size, (max(1, tokens // length), length), generator=generator)
    for _ in range(PASSES):
        hidden = forward(decoder, source, experts, windows, "text")
        windows[:, 1:] = decoder.sample(source, hidden, generator)[:, :-1]
    return windows


def by_expert(experts: Experts, module: str) -> list[list[ExpertMatrix]]:
    """Gate, up and down of each expert of a module, in order."""
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
        gate, up, down = (load(matrix) for matrix in expert)
        inner = activation(inputs @ gate.T) * (inputs @ up.T)
        outputs.index_add_(0, tokens, inner @ down.T * topk_weights[:, None])
    return outputs
