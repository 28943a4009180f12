"""The weights of one layer of routed experts, checked once when they are put together."""

from __future__ import annotations

from dataclasses import InitVar, dataclass

import torch

from alphaq_vllm.kernels.experts import PackedExperts
from alphaq_vllm.kernels.gate import SILU, Gate


@dataclass(frozen=True)
class MoEWeights:
    """The experts of one layer that this rank holds, both stems as ``prepare_`` leaves them on their device.

    Args:
        w13: gate and up of E experts, or up alone where these have no gate, N = intermediate size of this rank,
            K = hidden_size.
        w2: down, N and K exchanged.
        w13_bias: ``[E, P, N]``, of gate and up (P = 2) or of up (P = 1), contiguous, of any floating dtype.
        w2_bias: ``[E, hidden_size]``, contiguous, of any floating dtype.
        gate: how gate and up become one, or what up becomes.
        checked: these were the fields of another instance, so they need no further check.

    Raises:
        ValueError: for shapes that do not fit each other, for an order that the device does not take, and for an
            activation that is not supported.
    """

    w13: PackedExperts
    w2: PackedExperts
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    gate: Gate = SILU
    checked: InitVar[bool] = False

    def __post_init__(self, checked: bool) -> None:
        if checked:
            return
        self._check_experts()
        self._check_biases()
        self.gate.check(gated=self.w13.num_projections == 2)

    def _check_experts(self) -> None:
        w13, w2 = self.w13, self.w2
        if w13.num_projections not in (1, 2) or w2.num_projections != 1:
            raise ValueError(
                "w13, w2: expected 2 (or 1, without a gate) and 1 projections per expert, "
                f"got {w13.num_projections} and {w2.num_projections}"
            )
        if (w2.num_experts, w2.N, w2.K) != (w13.num_experts, w13.K, w13.N):
            raise ValueError(
                f"w2: expected {w13.num_experts} experts [{w13.K}, {w13.N}] to match w13, "
                f"got {w2.num_experts} experts [{w2.N}, {w2.K}]"
            )
        orders = ("checkpoint", "gpu") if w13.packed.is_cuda else ("checkpoint", "cpu")
        if w13.order not in orders or w2.order != w13.order:
            raise ValueError(
                f"w13, w2: expected one order out of {orders} on {w13.packed.device}, as prepare_ makes it, got "
                f"{w13.order!r} and {w2.order!r}"
            )

    def _check_biases(self) -> None:
        w13, w2 = self.w13, self.w2
        shapes = {
            "w13_bias": (self.w13_bias, (w13.num_experts, w13.num_projections, w13.N)),
            "w2_bias": (self.w2_bias, (w2.num_experts, w2.N)),
        }
        for name, (bias, shape) in shapes.items():
            if bias is not None and (bias.shape != shape or not bias.is_contiguous()):
                raise ValueError(f"{name}: expected a contiguous tensor {list(shape)}, got {list(bias.shape)}")
