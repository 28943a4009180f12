"""Quantization without data: for every group of weights the uniform grid with the least squared error.

A grid is an affine map from codes to weights, so for fixed codes the best scale and zero point are a linear regression
of the weights on the codes, and for a fixed grid the best codes are the nearest ones. Alternating the two only finds
the optimum nearby: each round here takes such a step from several disturbed copies of the best grid so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaq_vllm.format import SCALE_DTYPE, SUPPORTED_BITS, SUPPORTED_GROUP_SIZES, ZERO_DTYPE, matrix_tensors
from alphaq_vllm.packing import pack

# The first grids cover these fractions of the way from the group's range to its range divided by 2 ** (num_bits / 2).
STARTS = (0.0, 0.5, 1.0)
# Disturbances of a grid, in codes: a stretch that moves both its ends outwards, and a shift. Halved every round.
STRETCH, SHIFT, DIRECTIONS, ROUNDS = 0.6, 0.4, 8, 3
# Weights searched at a time: what keeps the disturbed copies in a CPU's cache, and a GPU busy.
CPU_CHUNK, GPU_CHUNK = 2**16, 2**22
# ``quantization_mse`` quantizes about this many groups, and no fewer rows.
SAMPLED_GROUPS, SAMPLED_ROWS = 4096, 64

SMALLEST_SCALE, LARGEST_SCALE = torch.finfo(SCALE_DTYPE).tiny, torch.finfo(SCALE_DTYPE).max
LARGEST_ZERO = torch.finfo(ZERO_DTYPE).max


@dataclass(frozen=True)
class Quantized:
    """One matrix as the format stores it, and the mean squared error of what is stored, in squared units of weight."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    mse: float


@dataclass(frozen=True)
class _Groups:
    """Groups as ``center + radius * x``, x in [-1, 1]: ``weight`` and ``x`` ``[groups, group_size]``, others
    ``[groups, 1]``, all float32. ``mean`` and ``variance`` are of x."""

    weight: Tensor
    x: Tensor
    center: Tensor
    radius: Tensor
    mean: Tensor
    variance: Tensor

    @property
    def sum_of_squares(self) -> Tensor:
        """Squared deviation from the groups' means, summed over everything: float64 scalar."""
        return (self.radius.double().square() * self.variance).sum() * self.x.shape[-1]


def quantize(weight: Tensor, num_bits: int, group_size: int) -> Quantized:
    """Quantize a matrix to the least squared error, without data.

    weight: ``[out_features, in_features]``, any floating dtype, any device.
    The error is that of the stored values, rounded as the format rounds them, against the weight in float32. Groups of
    one repeated bfloat16 or float16 value are exact.
    Raises ValueError for NaN or Inf and for a width or group size that the format does not have.
    """
    _check(weight, [num_bits], group_size)
    specs = matrix_tensors(weight.shape[0], weight.shape[1], num_bits, group_size)
    error = torch.zeros((), dtype=torch.float64, device=weight.device)
    parts: list[tuple[Tensor, ...]] = []
    for rows, groups in _chunks(weight, group_size):
        codes, scale, zero, sse = _quantize_groups(groups, num_bits)
        parts.append((pack(codes.view(rows.shape), num_bits), scale, zero))
        error += sse
    packed, scale, zero = (
        torch.cat(tensors).view(spec.shape)
        for tensors, spec in zip(zip(*parts, strict=True), specs.values(), strict=True)
    )
    return Quantized(packed, scale, zero, error.item() / weight.numel())


def quantization_mse(weight: Tensor, widths: Sequence[int], group_size: int) -> list[float]:
    """The mean squared error that ``quantize`` would leave at each width, to about one percent.

    weight: as for ``quantize``, which is run on evenly spaced rows only; their error relative to their squared
    deviation from the groups' means is multiplied with that of the whole matrix.
    Raises as ``quantize`` does, for NaN or Inf in any row.
    """
    _check(weight, widths, group_size)
    out_features, in_features = weight.shape
    total = sum(groups.sum_of_squares.item() for _, groups in _chunks(weight, group_size))
    rows = max(SAMPLED_ROWS, SAMPLED_GROUPS * group_size // in_features)
    step = max(1, out_features // rows)
    sampled, errors = _sum_errors(weight[step // 2 :: step], widths, group_size)
    # Constant groups say nothing of the others.
    if sampled == 0:
        sampled, errors = _sum_errors(weight, widths, group_size)
    scale = total / sampled if sampled else 1.0
    return [error * scale / weight.numel() for error in errors]


def _sum_errors(weight: Tensor, widths: Sequence[int], group_size: int) -> tuple[float, list[float]]:
    """Squared deviation from the groups' means, and squared quantization error at each width."""
    deviation, errors = 0.0, [0.0] * len(widths)
    for _, groups in _chunks(weight, group_size):
        deviation += groups.sum_of_squares.item()
        errors = [e + _quantize_groups(groups, b)[-1].item() for e, b in zip(errors, widths, strict=True)]
    return deviation, errors


def _check(weight: Tensor, widths: Sequence[int], group_size: int) -> None:
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(
            f"weight: expected floating point [out_features, in_features], got {weight.dtype} {tuple(weight.shape)}"
        )
    if group_size not in SUPPORTED_GROUP_SIZES:
        raise ValueError(f"group_size: expected one of {SUPPORTED_GROUP_SIZES}, got {group_size!r}")
    for num_bits in widths:
        if num_bits not in SUPPORTED_BITS:
            raise ValueError(f"num_bits: expected one of {SUPPORTED_BITS}, got {num_bits!r}")
        matrix_tensors(weight.shape[0], weight.shape[1], num_bits, group_size)


def _chunks(weight: Tensor, group_size: int) -> Iterator[tuple[Tensor, _Groups]]:
    size = CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK
    for rows in weight.split(max(1, size // weight.shape[1])):
        yield rows, _normalize(rows.float().reshape(-1, group_size))


def _normalize(weight: Tensor) -> _Groups:
    high, low = weight.amax(-1, keepdim=True) / 2, weight.amin(-1, keepdim=True) / 2
    center, radius = high + low, high - low
    if not radius.isfinite().all():
        raise ValueError("weight: expected finite values, got NaN or Inf: repair the source checkpoint")
    x = (weight - center).div_(radius.where(radius > 0, 1))
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square_().mean(-1, keepdim=True)
    return _Groups(weight, x, center, radius, mean, variance)


def _quantize_groups(groups: _Groups, num_bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes uint8 ``[groups, group_size]``, stored scale and zero ``[groups, 1]``, squared error float64 scalar."""
    top = 2**num_bits - 1
    inverse_step, zero = _search(groups, top)
    exact = groups.radius / inverse_step
    scale = exact.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(SCALE_DTYPE)
    # The middle of the grid stays where the search put it, whatever rounding does to the scale.
    zero = top / 2 - (groups.center + (top / 2 - zero) * exact) / scale.float()
    zero = zero.clamp(-LARGEST_ZERO, LARGEST_ZERO).to(ZERO_DTYPE)
    codes, sse = _encode(groups.weight, scale, zero, top)

    mean = groups.center + groups.radius * groups.mean
    flat_scale, flat_zero = _flat_grid(mean)
    bias = (mean.double() + flat_zero.double() * flat_scale.double()).square()
    flat_sse = (groups.radius.double().square() * groups.variance + bias) * codes.shape[-1]
    # Negated so that the NaN of an overflow counts as worse.
    flat = ~(sse <= flat_sse)
    if flat.any():
        scale, zero = torch.where(flat, flat_scale, scale), torch.where(flat, flat_zero, zero)
        codes, sse = _encode(groups.weight, scale, zero, top)
    return codes.to(torch.uint8), scale, zero, sse.sum()


def _encode(weight: Tensor, scale: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Nearest codes as float32, and each group's squared error as float64, for a grid as stored."""
    exact = (weight / scale.float()).add_(zero.float())
    codes = exact.clamp(0, top).round_()
    sse = exact.sub_(codes).square_().sum(-1, keepdim=True)
    return codes, sse.double() * scale.double().square()


def _flat_grid(mean: Tensor) -> tuple[Tensor, Tensor]:
    """The stored scale and zero whose code 0 is ``mean``: a power of two and the up to 11 significant bits."""
    _, exponent = torch.frexp(mean)
    scale = torch.ldexp(torch.ones_like(mean), exponent - 1).clamp(min=SMALLEST_SCALE).to(SCALE_DTYPE)
    return scale, (-mean / scale.float()).to(ZERO_DTYPE)


def _search(groups: _Groups, top: int) -> tuple[Tensor, Tensor]:
    """The best grids found for x: code = inverse_step * x + zero, both ``[groups, 1]``."""
    shrink = 1 - torch.tensor(STARTS, device=groups.x.device).view(-1, 1, 1) / math.sqrt(top + 1)
    inverse_step = (top / 2 / shrink).expand(-1, len(groups.x), 1)
    inverse_step, zero = _refit(groups, inverse_step, torch.full_like(inverse_step, top / 2), top)
    angles = torch.arange(DIRECTIONS, device=groups.x.device).view(-1, 1, 1) * (2 * math.pi / DIRECTIONS)
    # The undisturbed grid competes too, so that no round can make matters worse.
    ring = torch.stack((angles.cos() * STRETCH, angles.sin() * SHIFT))
    ring = torch.cat((torch.zeros_like(ring[:, :1]), ring), 1)
    for halvings in range(ROUNDS):
        stretch, shift = ring / 2**halvings
        factor = (2 / top * stretch).exp()
        inverse_step, zero = _refit(groups, inverse_step * factor, (zero - top / 2) * factor + top / 2 + shift, top)
    return inverse_step, zero


def _refit(groups: _Groups, inverse_step: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Encode x on each of the given grids ``[grids, groups, 1]``, fit a new grid to the codes, return the best.

    With u = x in units of codes and q = u + e its codes, regressing e instead of u on q keeps the error of 8-bit grids
    within float32's precision: for u = (1 - slope) * q - offset the error is var(e) - cov(e, q) ** 2 / var(q).
    """
    u = (groups.x * inverse_step).add_(zero)
    e = u.clamp(0, top).round_().sub_(u)
    mean_u, mean_e = inverse_step * groups.mean + zero, e.mean(-1, keepdim=True)
    cov_eu = u.mul_(e).mean(-1, keepdim=True) - mean_e * mean_u
    var_e = e.square_().mean(-1, keepdim=True) - mean_e.square()
    cov_eq, var_u = cov_eu + var_e, inverse_step.square() * groups.variance
    # Below the variance of any codes that are not all equal.
    slope = cov_eq / (var_u + cov_eu + cov_eq).clamp_min(1e-3)
    offset = mean_e - slope * (mean_u + mean_e)
    best = ((var_e - slope * cov_eq) / inverse_step.square()).argmin(0, keepdim=True)
    stretch = 1 / (1 - slope)
    return ((inverse_step * stretch).gather(0, best)[0], ((zero + offset) * stretch).gather(0, best)[0])
