"""How much of a matrix's error arrives at the output of its layer, without calibration data.

The model runs on text that it writes itself (see ``write_text``). That shows how often an expert is called upon, with
what weight, and what its gate, up and down make of an error: what spectra cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alphaq_vllm import packing
from offline.model.decoder import Decoder, Layer, Routes
from offline.model.forward import activated, forward
from offline.model.text import write_text
from offline.quantizers.quantize import quantize
from offline.source.checkpoint import Checkpoint
from offline.source.families import ExpertMatrix, Experts, load_weight
from offline.threads import one_thread

TOKENS, LENGTH = 4096, 256
# What stands for any quantization error: quick to make, and as uneven over a matrix as all of them.
NUM_BITS, QUANTIZER = 4, "rtn"
# An expert that no token reached still counts this much of its layer's mean: there is text that calls on it.
FLOOR = 0.01


@one_thread()
def error_gains(source: Checkpoint, experts: Experts, group_size: int) -> dict[str, float]:
    """By matrix name, the squared error of its layer's output that a mean squared error of 1 in its weights causes,
    relative to the square of that output.

    experts: all of the source's.
    Raises ValueError as ``Decoder`` does.
    """
    decoder = Decoder(source, experts)
    text = write_text(decoder, source, experts, TOKENS, LENGTH)
    gains: dict[str, float] = {}

    def observe(layer: Layer, matrices: Sequence[Sequence[ExpertMatrix]], routes: Routes, output: Tensor) -> None:
        energy = float(output.double().square().sum())
        found: dict[str, float] = {}
        for number, expert in enumerate(matrices):
            tokens, topk_weights = routes.of(number)
            inputs = routes.inputs[tokens]
            errors = expert_gains(source, expert, inputs, topk_weights, layer.activation, group_size)
            found |= {matrix.name: error / energy for matrix, error in zip(expert, errors, strict=True)}
        least = FLOOR * sum(found.values()) / len(found)
        gains.update({name: max(gain, least) for name, gain in found.items()})

    forward(decoder, source, experts, text, "propagate", observe)
    return gains


@torch.no_grad()
def expert_gains(
    source: Checkpoint,
    expert: Sequence[ExpertMatrix],
    inputs: Tensor,
    topk_weights: Tensor,
    activation: Callable[[Tensor], Tensor],
    group_size: int,
) -> list[float]:
    """The squared error of an expert's weighted outputs that a mean squared error of 1 in each of its matrices causes.

    inputs: ``[tokens, hidden_size]`` float32; topk_weights: ``[tokens]``; activation: applied to the output of gate, or
    of up without one.
    """
    if not len(inputs):
        return [0.0] * len(expert)
    weights = [load_weight(source, matrix) for matrix in expert]

    def outputs(*weights: Tensor) -> Tensor:
        *first, down = weights
        return activated(inputs, first, activation) @ down.T * topk_weights[:, None]

    exact = outputs(*weights)
    gains = []
    for place, weight in enumerate(weights):
        quantized = quantize(weight, NUM_BITS, group_size, QUANTIZER)
        changed = packing.dequantize(quantized.packed, quantized.scale, quantized.zero_point, NUM_BITS)
        others = [changed if place == i else other for i, other in enumerate(weights)]
        error = float((outputs(*others) - exact).double().square().sum())
        gains.append(error / quantized.mse if quantized.mse else 0.0)
    return gains
