"""Running a whole model on some tokens, with one layer and one expert in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from offline.model.decoder import Decoder
from offline.model.layer import Layer, Outputs, Routes, advance, route
from offline.model.passes import Pass
from offline.source.checkpoint import Checkpoint
from offline.source.families import ExpertMatrix, Experts, load_weight, matrix_nbytes
from offline.threads import compute_device, in_threads, one_thread

# Called after a layer with experts: the layer, its matrices by expert, what reached them, and the layer's output.
Observe = Callable[[Layer, Sequence[Sequence[ExpertMatrix]], Routes, Tensor], None]


@one_thread()
def forward(
    decoder: Decoder,
    source: Checkpoint,
    experts: Experts,
    windows: Tensor,
    what: str,
    observe: Observe | None = None,
    workers: int = 1,
    run: Pass | None = None,
) -> Tensor:
    """The output of the last layer, ``[windows, length, hidden_size]`` float32, for token ids ``windows``.

    experts: all of the source's; what: the name of the progress; workers: threads to use, which changes no number;
    run: the pass that this is, if it is kept, for the caller to finish. Layers behind it are not observed again.
    """
    device = compute_device()
    run = run or Pass(decoder, what)
    hidden = run.begin(source, windows)
    load = partial(load_weight, source)
    with run.progress(what, source, experts) as progress:
        for layer in run.layers(hidden):
            with layer.loaded(source, device):
                if layer.source_experts is None:
                    advance(layer, hidden, workers)
                    continue
                routes = route(layer, hidden, workers)
            matrices = experts.of(layer.source_experts)
            outputs = Outputs(layer, hidden, routes)
            run_experts(matrices, load, routes, outputs, workers)
            outputs.finish(source, workers)
            if observe:
                observe(layer, matrices, routes, hidden)
            progress.advance(sum(matrix_nbytes(source, matrix) for expert in matrices for matrix in expert))
    return hidden


def run_experts(
    experts: Sequence[Sequence[ExpertMatrix]],
    load: Callable[[ExpertMatrix], Tensor],
    routes: Routes,
    outputs: Outputs,
    workers: int = 1,
) -> None:
    """Add what comes out of the experts to ``outputs``, in the same order on every run."""

    def run(number: int) -> Tensor:
        tokens, topk_weights = routes.of(number)
        *first, down = (load(matrix) for matrix in experts[number])
        formula = routes.formula.of(number)
        return formula.project(formula.inner(routes.inputs[tokens], first), down, topk_weights)

    for number, output in enumerate(in_threads(run, range(len(experts)), workers)):
        outputs.add(number, output)
