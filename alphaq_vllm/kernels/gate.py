"""What stands between the two products of an expert: the activation, gated or not."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

# In the order of activations.h.
SUPPORTED_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swiglustep")


class Gate(NamedTuple):
    """How gate and up become one: ``act(gate) * (up + beta)`` with ``gate <= limit`` and ``-limit <= up <= limit``.

    Of experts without a gate it is ``act(up)``, which knows no limit.

    activation: one of SUPPORTED_ACTIVATIONS; silu is ``gate * sigmoid(alpha * gate)``, the others know no alpha;
        relu2 is the square of what is positive; swiglustep is silu whose result is limited, not its argument.
    """

    activation: str = "silu"
    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0

    def apply(self, *products: torch.Tensor) -> torch.Tensor:
        """Compute the activation.

        Args:
            products: gate and up, or up alone, all of one shape and floating dtype.

        Returns:
            A tensor of the same shape and dtype.
        """
        if len(products) == 1:
            return self._activate(products[0])
        gate, up = products
        if self.limit is not None:
            up = up.clamp(-self.limit, self.limit)
            if self.activation != "swiglustep":
                gate = gate.clamp(max=self.limit)
        activated = self._activate(gate)
        if self.activation == "swiglustep":
            activated = activated.clamp(max=self.limit)
        return activated * (up + self.beta)

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation == "relu2":
            return x.relu().square()
        if self.activation.startswith("gelu"):
            return F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return x * (self.alpha * x).sigmoid()

    def check(self, gated: bool) -> None:
        """Raise ValueError for an activation that is not supported, of experts with a gate or without one."""
        if self.activation not in SUPPORTED_ACTIVATIONS:
            raise ValueError(f"activation: expected one of {SUPPORTED_ACTIVATIONS}, got {self.activation!r}")
        if self.activation == "swiglustep" and (not gated or self.limit is None):
            raise ValueError(
                f"activation: expected a gate and a limit for swiglustep, got gated={gated} and limit={self.limit}"
            )
        if not gated and self != Gate(self.activation):
            raise ValueError(f"gate: expected no limit, alpha or beta for experts without a gate, got {self}")


SILU = Gate()
GPT_OSS = Gate("silu", limit=7.0, alpha=1.702, beta=1.0)
