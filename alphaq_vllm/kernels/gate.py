"""What stands between the two products of an expert: the gated activation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

SUPPORTED_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


class Gate(NamedTuple):
    """How gate and up become one: ``act(gate) * (up + beta)`` with ``gate <= limit`` and ``-limit <= up <= limit``.

    activation: one of SUPPORTED_ACTIVATIONS; silu is ``gate * sigmoid(alpha * gate)``, the others know no alpha.
    """

    activation: str = "silu"
    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0

    def apply(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Compute the gated activation.

        Args:
            gate: of any shape and floating dtype.
            up: of the same.

        Returns:
            A tensor of the same shape and dtype.
        """
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.activation == "silu":
            activated = gate * (self.alpha * gate).sigmoid()
        else:
            activated = F.gelu(gate, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return activated * (up + self.beta)


SILU = Gate()
GPT_OSS = Gate("silu", limit=7.0, alpha=1.702, beta=1.0)
