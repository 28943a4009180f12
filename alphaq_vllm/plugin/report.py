"""The two lines that a server's log has on AlphaQ: what was loaded, and which kernels serve it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alphaq_vllm.plugin._compat import logger


class LoadReport:
    """Collects what the layers of one model load, and logs it when the last of them is done; later loads of the same
    layers are silent. The model that drafts, whose layers come after that, is another.
    """

    def __init__(self) -> None:
        self.pending: set[str] = set()
        self.logged = False
        self.numel: dict[int, int] = {}
        self.matrices = self.expert_layers = self.expert_bytes = 0
        self.expert_kernels: set[str] = set()
        self.linear_kernels: dict[str, int] = {}

    def expect(self, prefix: str) -> None:
        """Wait for this layer."""
        if self.logged:
            vars(self).update(vars(LoadReport()))
        self.pending.add(prefix)

    def experts_loaded(
        self, prefix: str, matrix_numel: int, num_bits: Mapping[str, Sequence[int]], nbytes: int, kernels: str
    ) -> None:
        """A layer of experts is ready; num_bits: of the matrices on this rank, by projection, all of one size."""
        for widths in num_bits.values():
            for width in widths:
                self.numel[width] = self.numel.get(width, 0) + matrix_numel
            self.matrices += len(widths)
        self.expert_layers += 1
        self.expert_bytes += nbytes
        self.expert_kernels.add(kernels)
        self._done(prefix)

    def linear_loaded(self, prefix: str, kernel: str) -> None:
        """A linear layer is ready; kernel: the name of vLLM's class, or of what it does without one."""
        self.linear_kernels[kernel] = self.linear_kernels.get(kernel, 0) + 1
        self._done(prefix)

    def _done(self, prefix: str) -> None:
        self.pending.discard(prefix)
        if self.pending or self.logged:
            return
        self.logged = True
        linear = ", ".join(f"{number} linear layers on {name}" for name, number in self.linear_kernels.items())
        if self.matrices:
            bits = sum(width * numel for width, numel in self.numel.items()) / sum(self.numel.values())
            logger.info(
                "AlphaQ: loaded %d expert matrices of %d layers at %.2f bits per weight (widths %s), %.1f MiB with "
                "their grids",
                self.matrices,
                self.expert_layers,
                bits,
                ", ".join(map(str, sorted(self.numel))),
                self.expert_bytes / 2**20,
            )
        experts = [f"experts on {name}" for name in sorted(self.expert_kernels)]
        logger.info("AlphaQ: %s", "; ".join([*experts, linear or "no linear layer is quantized"]))
