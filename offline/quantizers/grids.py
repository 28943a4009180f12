"""Three ways to find the uniform grid of a group of weights without data. ``GRIDS`` names them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from offline.quantizers import native
from offline.quantizers.groups import FindGrid, Groups

# The first grids cover these fractions of the way from the group's range to its range divided by 2 ** (num_bits / 2).
STARTS = (0.0, 0.5, 1.0)
# Disturbances of a grid, in codes: a stretch that moves both its ends outwards, and a shift. Halved every round.
STRETCH, SHIFT, DIRECTIONS, ROUNDS = 0.6, 0.4, 8, 3
# HQQ's norm, the weight of its quadratic penalty for a unit standard deviation, the penalty's growth, and the steps.
HQQ_NORM, HQQ_BETA, HQQ_KAPPA, HQQ_STEPS = 0.7, 10.0, 1.01, 20


def rtn_grid(groups: Groups, top: int) -> tuple[Tensor, Tensor]:
    """Round to nearest: the group's range in equal steps."""
    half = torch.full_like(groups.radius, top / 2)
    return half, half


def hqq_grid(groups: Groups, top: int) -> tuple[Tensor, Tensor]:
    """Half-quadratic quantization: the scale of the range, and the zero point with a small l_p error.

    Each step shrinks the errors towards the few outliers that an l_p norm with p < 1 tolerates, and moves the zero
    point to the mean over what remains (Badri and Shaji, *Half-Quadratic Quantization of Large Machine Learning
    Models*, 2023). Errors are measured in standard deviations of the group, so that the result follows its scale.
    """
    inverse_step = zero = torch.full_like(groups.radius, top / 2)
    deviation = groups.variance.sqrt()
    for step in range(HQQ_STEPS):
        exact = groups.x * inverse_step + zero
        codes = exact.clamp(0, top).round_()
        error = (exact - codes) / (inverse_step * deviation)
        size = error.abs()
        shrunk = (size - size.pow(HQQ_NORM - 1) / (HQQ_BETA * HQQ_KAPPA**step)).clamp_min_(0).copysign_(error)
        zero = zero + (codes - exact + shrunk * (inverse_step * deviation)).mean(-1, keepdim=True)
    return inverse_step, zero


def mse_grid(groups: Groups, top: int) -> tuple[Tensor, Tensor]:
    """The least squared error.

    For fixed codes the best scale and zero point are a linear regression of the weights on the codes, and for a fixed
    grid the best codes are the nearest ones. Alternating the two only finds the optimum nearby: each round here takes
    such a step from several disturbed copies of the best grid so far. On a CPU native code does it where there is one.
    """
    device = groups.x.device
    starts, factors, shifts = grid_attempts(top, device)
    if device.type == "cpu" and (code := native.library()):
        return native.mse_grid(code, groups, top, (starts, factors, shifts))
    inverse_step = starts.view(-1, 1, 1).expand(-1, len(groups.x), 1)
    inverse_step, zero = _refit(groups, inverse_step, torch.full_like(inverse_step, top / 2), top)
    for factor, shift in zip(factors[..., None, None], shifts[..., None, None], strict=True):
        inverse_step, zero = _refit(groups, inverse_step * factor, (zero - top / 2) * factor + top / 2 + shift, top)
    return inverse_step, zero


def grid_attempts(top: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What ``mse_grid`` tries: inverse steps of the first grids, ``[len(STARTS)]``, and by what the best grid is
    stretched and shifted, ``[ROUNDS, 1 + DIRECTIONS]``, all float32.
    """
    # Nothing is left to the default dtype, which vLLM changes while it loads a model.
    dtype = torch.float32
    starts = top / 2 / (1 - torch.tensor(STARTS, dtype=dtype, device=device) / math.sqrt(top + 1))
    angles = torch.arange(DIRECTIONS, dtype=dtype, device=device) * (2 * math.pi / DIRECTIONS)
    # The undisturbed grid competes too, so that no round can make matters worse.
    ring = torch.stack((angles.cos() * STRETCH, angles.sin() * SHIFT))
    ring = torch.cat((torch.zeros_like(ring[:, :1]), ring), 1)
    stretches, shifts = ring[:, None] / 2 ** torch.arange(ROUNDS, dtype=dtype, device=device)[:, None]
    factors = (2 / top * stretches).exp()
    return starts, factors, shifts


def _refit(groups: Groups, inverse_step: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor]:
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


GRIDS: dict[str, FindGrid] = {"mse": mse_grid, "rtn": rtn_grid, "hqq": hqq_grid}
