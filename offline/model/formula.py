"""How the routed experts of a layer compute, as their module in transformers shows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import NoneType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

# Tokens that go through an expert at a time.
TOKENS_AT_A_TIME = 1024
# What transformers gives to modules of experts that compute ``down(act_fn(gate) * up)``.
_DEFAULT_GATE = "_default_apply_gate"
# The matrices of experts with a gate, and without; either may have biases.
_GATED, _GATELESS = ("gate_up_proj", "down_proj"), ("up_proj", "down_proj")
_BIAS = "_bias"
# How many arguments a module of experts takes: inputs, and for each the ids and weights of its experts; or as of
# ``takes_sorted``.
_ROUTED, _SORTED = 3, 1


@dataclass(frozen=True)
class Formula:
    """``down(activation(gate(x)) * up(x))``, or ``down(activation(up(x)))`` without a gate, each with its bias if there
    are biases.

    activation: where it is ``joint``, it makes one of gate's and up's outputs itself, and takes both in one tensor, one
    half after the other or ``interleaved``, gate's first; biases: of gate, up and down, or up and down, or none: of all
    experts of a layer, ``[experts, out_features]``, or of one, ``[out_features]``.
    """

    activation: Callable[[Tensor], Tensor]
    joint: bool = False
    interleaved: bool = False
    biases: tuple[Tensor, ...] = ()

    def of(self, expert: int) -> Formula:
        """That of one expert; its biases are copies, so that they reach another process alone."""
        return replace(self, biases=tuple(bias[expert].clone() for bias in self.biases))

    def states(self, inputs: Tensor, first: Sequence[Tensor]) -> list[Tensor]:
        """What an expert's first matrices, gate and up or up alone, make of ``[tokens, features]``."""
        return [self.state(inputs, weight, place) for place, weight in enumerate(first)]

    def state(self, inputs: Tensor, weight: Tensor, place: int) -> Tensor:
        """What an expert's matrix number ``place`` makes of ``[tokens, in_features]``."""
        state = inputs @ weight.T
        return state.add_(self.biases[place]) if self.biases else state

    def activate(self, states: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """What ``states`` gives as one, which down is applied to; out: where it goes."""
        if not self.joint:
            activated = self.activation(states[0])
            if len(states) == 2:
                return torch.mul(activated, states[1], out=out)
        elif self.interleaved:
            activated = self.activation(torch.stack(tuple(states), -1).flatten(-2))
        else:
            activated = self.activation(torch.cat(tuple(states), -1))
        return activated if out is None else out.copy_(activated)

    def inner(self, inputs: Tensor, first: Sequence[Tensor]) -> Tensor:
        """What an expert's down is applied to, ``[tokens, intermediate_size]``; inputs, first: as of ``states``."""
        inner = inputs.new_empty(len(inputs), len(first[0]))
        for part, out in zip(inputs.split(TOKENS_AT_A_TIME), inner.split(TOKENS_AT_A_TIME), strict=True):
            self.activate(self.states(part, first), out)
        return inner

    def project(self, inner: Tensor, down: Tensor, topk_weights: Tensor) -> Tensor:
        """An expert's weighted outputs, ``[tokens, features]``."""
        outputs = inner.new_empty(len(inner), len(down))
        for part, out in zip(inner.split(TOKENS_AT_A_TIME), outputs.split(TOKENS_AT_A_TIME), strict=True):
            torch.mm(part, down.T, out=out)
        if self.biases:
            outputs.add_(self.biases[-1])
        return outputs.mul_(topk_weights[:, None])


def is_known(experts: nn.Module) -> bool:
    """Whether a module of experts computes as some ``Formula``."""
    names = {name for name, _ in experts.named_parameters()}
    matrices = set(_matrices(experts))
    return (
        names in (matrices, matrices | {name + _BIAS for name in matrices})
        and _num_arguments(experts) in (_ROUTED, _SORTED)
        and (_own_gate(experts) is not None or hasattr(experts, "act_fn"))
    )


def formula_of(experts: Any) -> Formula:
    """That of a module of experts that ``is_known``, with its biases as they are now."""
    from transformers.activations import SiLUActivation

    first, down = _matrices(experts)
    if own := _own_gate(experts):
        activation, interleaved = own, _interleaves(own)
    else:
        # Torch's own function reaches another process without an import of transformers there.
        plain = isinstance(experts.act_fn, SiLUActivation)
        activation, interleaved = nn.functional.silu if plain else experts.act_fn, False
    if not hasattr(experts, down + _BIAS):
        return Formula(activation, own is not None, interleaved)
    bias, last = (getattr(experts, name + _BIAS).detach() for name in (first, down))
    halves = (bias[:, ::2], bias[:, 1::2]) if interleaved else bias.chunk(2, 1)
    biases = (*halves, last) if first == _GATED[0] else (bias, last)
    return Formula(activation, own is not None, interleaved, biases)


def takes_sorted(experts: nn.Module) -> bool:
    """Whether a module of experts is called with the inputs of one expert after another, each multiplied by its weight,
    and zeros for those that it does not get.
    """
    return _num_arguments(experts) == _SORTED


def _matrices(experts: nn.Module) -> tuple[str, str]:
    return _GATED if hasattr(experts, _GATED[0]) else _GATELESS


def _num_arguments(experts: nn.Module) -> int:
    return len(inspect.signature(type(experts).forward).parameters) - 1


def _own_gate(experts: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What a module makes one of gate and up by, where that is code of its own, apart from the module's weights."""
    gate = getattr(type(experts), "_apply_gate", None)
    if gate is None or gate.__name__ == _DEFAULT_GATE or _matrices(experts) == _GATELESS:
        return None
    settings = {name: value for name, value in vars(experts).items() if isinstance(value, (int, float, str, NoneType))}
    return partial(gate, SimpleNamespace(**settings, **dict(experts.named_children())))


def _interleaves(gate: Callable[[Tensor], Tensor]) -> bool:
    """Whether gate and up alternate in what it takes: then a NaN in the second place arrives in the first."""
    return bool(gate(torch.tensor([0.0, torch.nan, 0.0, 0.0]))[0].isnan())
