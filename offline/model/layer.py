"""One decoder layer: its weights while they are needed, what reaches its experts, and what they add to its output.

A layer runs once, for what reaches its experts and for its output without theirs, which most families add to the rest
of the layer's output: so that somebody else can do it later. Where a layer does more with what comes out of its
experts, such as to normalize it, it runs twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offline.model.formula import Formula, formula_of
from offline.model.handed import Arguments, Handed, Place, filled, places, same
from offline.model.runnable import place_buffers
from offline.source.checkpoint import Checkpoint
from offline.threads import SharedTensor, in_threads, release_memory

# How far the output of a layer may be from its experts' output times a number, added to the rest.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Routes:
    """What reaches the experts of a layer: ``inputs``, ``[tokens, features]``, in memory that is ``shared``;
    ``topk_ids`` and ``topk_weights``, ``[tokens, k]``.

    formula: how the experts compute; before: the input of the layer, if it has to run again; back: ``[hidden_size,
    features]``, what the sum of their outputs is multiplied with where they compute on latents.
    """

    shared: SharedTensor
    topk_ids: Tensor
    topk_weights: Tensor
    formula: Formula
    before: Tensor | None = None
    back: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """``[tokens, features]``, float32."""
        return self.shared.tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens of one expert, int64, and their weights, float32."""
        tokens, slots = torch.where(self.topk_ids == expert)
        return tokens, self.topk_weights[tokens, slots].float()


@dataclass
class Layer:
    """A decoder layer.

    tensors: the source's tensors whose rows, one's after another's, make each parameter and buffer of the module but
    its experts'; experts: the module of routed experts and source_experts its name in the source, if it has one; back:
    what projects the sum of their outputs from latents, if anything does; buffers: what no checkpoint has of it;
    arguments: what it is called with besides its input, and takes what it needs for that of what the layer before it
    returns, which ``handed`` has by window; following: the layer after it; scale: what the output of the experts,
    projected back, is multiplied by before it is added to the rest, None if that is not all that happens to it, and
    unknown before the layer runs.
    """

    module: nn.Module
    tensors: Mapping[str, Sequence[str]]
    experts: nn.Module | None
    source_experts: str | None
    back: nn.Linear | None = None
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    arguments: Arguments = ((), {})
    takes: list[Place] = field(default_factory=list)
    handed: dict[int, Handed] = field(default_factory=dict)
    following: Layer | None = field(default=None, repr=False)
    scale: float | None = None
    probed: bool = False

    @contextmanager
    def loaded(self, source: Checkpoint, device: torch.device) -> Iterator[None]:
        """Have the weights in memory, in float32."""
        weights = {}
        for key, names in self.tensors.items():
            parts = [source.load(name).to(device, torch.float32) for name in names]
            weights[key] = torch.cat(parts) if len(parts) > 1 else parts[0]
        parts = []
        self.module.load_state_dict(weights, strict=False, assign=True)
        del weights
        place_buffers(self.module, self.buffers, device)
        try:
            yield
        finally:
            self.module.to("meta")
            release_memory()


@torch.no_grad()
def route(layer: Layer, hidden: Tensor, workers: int = 1) -> Routes:
    """What reaches the experts of a loaded layer with the input ``hidden``, ``[windows, length, hidden_size]``.

    ``hidden`` becomes the layer's output but for what ``Outputs`` adds. workers: threads to use, which changes no
    number.
    """
    seen = threading.local()
    features = hidden.shape[2] if layer.back is None else layer.back.in_features
    shared = SharedTensor((hidden[..., 0].numel(), features), hidden.device)
    inputs = shared.tensor.view(*hidden.shape[:2], features)
    if not layer.probed and not hidden.is_meta:
        layer.scale, layer.probed = _scale(layer, hidden), True
    before = hidden.clone() if layer.probed and layer.scale is None else None

    def record(hidden_states: Tensor, *topk: Tensor) -> Tensor:
        seen.inputs, seen.topk = (hidden_states, topk) if topk else _unsorted(hidden_states, hidden.shape[1])
        return torch.zeros_like(hidden_states)

    def run(number: int) -> tuple[Tensor, Tensor]:
        hidden[number] = _call(layer, hidden, number)
        inputs[number] = seen.inputs.view_as(inputs[number])
        return seen.topk

    layer.experts.forward = record  # type: ignore[union-attr, method-assign]
    topk_ids, topk_weights = zip(*in_threads(run, range(len(hidden)), workers), strict=True)
    back = None if layer.back is None else layer.back.weight.detach()
    formula = formula_of(layer.experts)
    return Routes(shared, torch.cat(topk_ids), torch.cat(topk_weights), formula, before, back)


def _unsorted(inputs: Tensor, tokens: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The inputs of so many tokens, with the ids and weights of their experts, from those of one expert after another,
    which have their weights, and are zero for all experts of a token but one.
    """
    by_expert = inputs.unflatten(0, (-1, tokens))
    ids = torch.linalg.vector_norm(by_expert, dim=-1).argmax(0)
    chosen = by_expert[ids, torch.arange(tokens, device=ids.device)]
    return chosen, (ids[:, None], chosen.new_ones(tokens, 1))


def _answer(outputs: Tensor, hidden_states: Tensor) -> Tensor:
    """What stands for the answer of experts to ``hidden_states``: their outputs, which ``takes_sorted`` has from the
    first expert, because the layer adds those of all.
    """
    answer = torch.zeros_like(hidden_states)
    answer.view(-1, outputs.shape[-1])[: outputs[..., 0].numel()] = outputs.flatten(0, -2)
    return answer


def _scale(layer: Layer, hidden: Tensor) -> float | None:
    """What a layer multiplies the output of its experts by before it adds it to the rest, if that is all that it does.

    It is found by adding noise to that output.
    """
    window = hidden[0]
    features = window.shape[-1] if layer.back is None else layer.back.in_features
    outputs = window.new_zeros(*window.shape[:-1], features)
    layer.experts.forward = lambda hidden_states, *_: _answer(outputs, hidden_states)  # type: ignore[union-attr]
    without, handed = _call(layer, hidden, 0).view_as(window), _handed_on(layer, 0)
    noise = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(window.device)
    outputs = noise * without.square().mean().sqrt()
    change = (_call(layer, hidden, 0).view_as(window) - without).double()
    if not same(handed, _handed_on(layer, 0)):
        return None
    added = (outputs if layer.back is None else outputs @ layer.back.weight.T).double()
    scale = float((change * added).sum() / added.square().sum())
    # Multipliers have few digits, and rounding blurs the last ones.
    scale = float(f"{scale:.6g}")
    return scale if float((change - scale * added).norm()) < _ROUNDING * float(change.norm()) else None


class Outputs:
    """Takes what comes out of a layer's experts, and adds it to what ``route`` has left of ``hidden``.

    layer, routes: what was routed, and what ``route`` returned.
    """

    def __init__(self, layer: Layer, hidden: Tensor, routes: Routes) -> None:
        self._layer, self._hidden, self._routes = layer, hidden, routes
        # Where the layer only adds their sum, it is not kept apart: it takes as much memory as ``hidden``.
        self._direct = routes.before is None and routes.back is None
        self._sum = hidden.flatten(0, 1) if self._direct else torch.zeros_like(routes.inputs)

    @torch.no_grad()
    def add(self, expert: int, output: Tensor) -> None:
        """Add the output of an expert for its tokens, ``[tokens of the expert, features]``.

        The order of calls decides how the sum is rounded.
        """
        scale = float(self._layer.scale) if self._direct else 1.0  # type: ignore[arg-type]
        self._sum.index_add_(0, self._routes.of(expert)[0], output, alpha=scale)

    @torch.no_grad()
    def finish(self, source: Checkpoint, workers: int = 1) -> None:
        """Make ``hidden`` the output of the layer, after all experts.

        source: where the layer is loaded from if it has to run again; workers: threads to use, which changes no number.
        """
        layer, hidden, before, part = self._layer, self._hidden, self._routes.before, threading.local()
        if before is None:
            if self._routes.back is not None:
                hidden.flatten(0, 1).addmm_(self._sum, self._routes.back.T, alpha=layer.scale)  # type: ignore[arg-type]
            return
        outputs = self._sum.view(*hidden.shape[:2], -1)

        def run(number: int) -> None:
            part.outputs = outputs[number]
            hidden[number] = _call(layer, before, number)

        with layer.loaded(source, hidden.device):
            layer.experts.forward = lambda states, *_: _answer(part.outputs, states)  # type: ignore[union-attr]
            for _ in in_threads(run, range(len(hidden)), workers):
                pass


@torch.no_grad()
def advance(layer: Layer, hidden: Tensor, workers: int = 1) -> None:
    """Replace ``hidden``, the input of a loaded layer without experts, by its output; workers: as of ``route``."""

    def run(number: int) -> None:
        hidden[number] = _call(layer, hidden, number)

    for _ in in_threads(run, range(len(hidden)), workers):
        pass


def _call(layer: Layer, hidden: Tensor, number: int) -> Tensor:
    """A layer's output for one window of its input; what it returns besides goes to the following layer."""
    positional, named = filled(layer.arguments, layer.handed[number]) if layer.takes else layer.arguments
    returned = layer.module(hidden[number][None], *positional, **named)
    if layer.following and layer.following.takes:
        layer.following.handed[number] = {part.place: returned[part.place] for part in layer.following.takes}
    output: Tensor = returned[0]
    return output


def _handed_on(layer: Layer, number: int) -> Handed:
    """What a layer has returned for a window, of what the following layer takes."""
    return layer.following.handed.get(number, {}) if layer.following else {}


def recorder(layer: Layer, number: int, num_returned: int) -> Callable[..., Any]:
    """What stands for a layer to learn with what else the decoder calls it; it passes its input on.

    number: of the layer; num_returned: how many values the decoder takes from it.
    Raises ValueError where the layer takes what another than the one before it returns.
    """

    def record(hidden_states: Tensor, *positional: Any, **named: Any) -> Any:
        layer.arguments = positional, named
        layer.takes, layer.handed = places(layer.arguments), {}
        for part in layer.takes:
            if part.layer != number - 1:
                raise ValueError(
                    f"layer {number}: expected to be called with what layer {number - 1} returns, "
                    f"got what layer {part.layer} returns"
                )
        others = [Place(number, place) for place in range(1, num_returned)]
        return (hidden_states, *others) if others else hidden_states

    return record
