"""Quantization of linear layers without data: for every group the scale, of either sign, with the least squared error.

The largest weight of a group always gets a negative code, because there is one more of those. For fixed codes the best
scale is a linear regression through the origin, so each scale that is tried is first fitted to its own codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alphaq_vllm.format import LINEAR_BITS, SCALE_DTYPE, linear_tensors
from alphaq_vllm.linear_packing import pack

# First scales tried, from one that reaches all weights to one that clips those above ``1 - CLIP / 2 ** num_bits`` of
# the largest; then rounds of scales around the best one, each round half as far apart.
STARTS, CLIP, NEIGHBOURS, ROUNDS = 8, 8, 4, 2
# Weights searched at a time: what keeps the scales tried in a CPU's cache, and a GPU busy.
CPU_CHUNK, GPU_CHUNK = 2**16, 2**22
SMALLEST_SCALE = torch.finfo(SCALE_DTYPE).tiny


@dataclass(frozen=True)
class Symmetric:
    """One linear layer as the format stores it, and the mean squared error, in squared units of weight."""

    packed: Tensor
    scale: Tensor
    mse: float


def quantize_symmetric(weight: Tensor, num_bits: int, group_size: int) -> Symmetric:
    """Quantize a matrix to the least squared error that a scale per group allows.

    weight: ``[out_features, in_features]``, any floating dtype, any device.
    The error is that of the stored values against the weight in float32. Groups of one repeated bfloat16 value are
    exact.
    Raises ValueError for NaN or Inf, for an unsupported width, and if group_size does not divide in_features.
    """
    if num_bits not in LINEAR_BITS:
        raise ValueError(f"num_bits: expected one of {LINEAR_BITS}, got {num_bits!r}")
    if not bool(weight.isfinite().all()):
        raise ValueError("weight: expected finite values, got NaN or Inf: repair the source checkpoint")
    specs = linear_tensors(weight.shape[0], weight.shape[1], num_bits, group_size)
    chunk = CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK
    parts, error = [], 0.0
    for rows in weight.split(max(1, chunk // weight.shape[1])):
        codes, scale, sse = _quantize_groups(rows.float().reshape(-1, group_size), num_bits)
        parts.append((pack(codes.view(rows.shape), num_bits), scale))
        error += sse
    packed, scale = (
        torch.cat(tensors).view(spec.shape)
        for tensors, spec in zip(zip(*parts, strict=True), specs.values(), strict=True)
    )
    return Symmetric(packed, scale, error / weight.numel())


def largest_mse(weight: Tensor, num_bits: int, group_size: int) -> float:
    """The largest mean squared error that a quantized matrix may have: half a step in every weight, for the scales that
    reach the largest weights. Rounding to nearest gives a third of that.
    """
    step = weight.double().abs().view(-1, group_size).amax(-1) / (2 ** (num_bits - 1) - 1)
    return float((step / 2).square().mean()) + SMALLEST_SCALE**2


def _quantize_groups(weight: Tensor, num_bits: int) -> tuple[Tensor, Tensor, float]:
    """Codes int8 ``[groups, group_size]``, stored scale ``[groups, 1]``, and the summed squared error."""
    half = 2 ** (num_bits - 1)
    largest = weight.gather(1, weight.abs().argmax(1, keepdim=True))
    x = weight / -largest.where(largest != 0, 1)
    scale = (-largest / _search(x, half)).to(SCALE_DTYPE)
    scale = scale.where(scale.abs() >= SMALLEST_SCALE, SMALLEST_SCALE)
    codes = (weight / scale.float()).round_().clamp_(-half, half - 1)
    sse = (weight.double() - codes.double() * scale.double()).square().sum()
    return codes.to(torch.int8), scale, sse.item()


def _search(x: Tensor, half: int) -> Tensor:
    """The best number of codes per unit of x, ``[groups, 1]``, for x with a largest magnitude of -1."""
    reach = torch.linspace((half - 1) / half, 1 / (1 - CLIP / (2 * half)), STARTS, dtype=torch.float32, device=x.device)
    step = float(reach[1] - reach[0])
    # Of equal errors the first counts: for one value and zeros the scale that is a power of two of it, hence exact.
    starts = half * torch.cat((torch.ones_like(reach[:1]), reach))
    error, inverse_step = _fit(x, starts.view(-1, 1, 1).expand(-1, len(x), 1), half)
    around = torch.linspace(-1, 1, NEIGHBOURS + 1, dtype=torch.float32, device=x.device).view(-1, 1, 1)
    for halvings in range(ROUNDS):
        candidates = inverse_step * (1 + around * step / 2**halvings)
        new_error, new_inverse_step = _fit(x, candidates, half)
        inverse_step = torch.where(new_error < error, new_inverse_step, inverse_step)
        error = torch.minimum(error, new_error)
    return inverse_step


def _fit(x: Tensor, inverse_step: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Encode x with each of the given scales ``[scales, groups, 1]``, fit a scale to the codes, return the best and
    its squared error.

    With q = codes and r = x in codes - q, regressing r instead of x on q keeps 8-bit errors in float32's precision.
    """
    r = x * inverse_step
    q = r.clamp(-half, half - 1).round_()
    r.sub_(q)
    r_q, q_q = (r * q).sum(-1, keepdim=True), q.square_().sum(-1, keepdim=True)
    slope = r_q / q_q.clamp_min(0.5)
    error = (r.square_().sum(-1, keepdim=True) - slope * r_q) / inverse_step.square()
    best = error.argmin(0, keepdim=True)
    return error.gather(0, best)[0], (inverse_step / (1 + slope)).gather(0, best)[0]
