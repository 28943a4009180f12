"""How large known models are at each average of bits, and how many ranks of tensor parallelism share them.

    python -m benchmarks.sizes

Computed from the numbers of their published configs, without any download. A size is that of all tensors of the
checkpoint: codes, grids and scales of the routed experts, and 16 bits for each other parameter, with what sees
images, where the checkpoint has it. The experts of layers for multi-token prediction have their default width.
"""

from __future__ import annotations

from dataclasses import dataclass

from alphaq_vllm.format import SCALE_DTYPE, SUPPORTED_GROUP_SIZES, stored_bits_per_weight
from alphaq_vllm.ranks import fitting_ranks
from offline.operations.options import ConvertOptions

BITS = (4.0, 3.5, 3.0, 2.5)
# The most ranks that the table asks about, powers of two.
MAX_RANKS = 16


@dataclass(frozen=True)
class Model:
    """A published checkpoint.

    layers: those with routed experts, but for layers for multi-token prediction; num_heads: of attention;
    num_parameters: of the whole checkpoint, with everything that is stored, but without scales where it is quantized;
    draft_layers: those for multi-token prediction, each with routed experts.
    """

    name: str
    layers: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_parameters: int
    draft_layers: int = 0

    @property
    def num_expert_weights(self) -> int:
        """Weights of the routed experts: gate, up and down."""
        return self.layers * self._layer_weights

    @property
    def _layer_weights(self) -> int:
        return self.num_experts * 3 * self.hidden_size * self.intermediate_size

    @property
    def group_size(self) -> int:
        """The default, or the greatest below it that divides the rows of all expert matrices."""
        return max(size for size in SUPPORTED_GROUP_SIZES if size <= ConvertOptions.group_size and self._fits(size))

    def nbytes(self, bits: float, group_size: int) -> int:
        """All tensors with experts of ``bits`` on average in groups of ``group_size``."""
        experts, drafts = self.num_expert_weights, self.draft_layers * self._layer_weights
        stored = experts * stored_bits_per_weight(bits, group_size)
        stored += drafts * stored_bits_per_weight(ConvertOptions.mtp_bits, group_size)
        # A scale for each row of gate, up and down.
        layers = self.layers + self.draft_layers
        scales = layers * self.num_experts * (2 * self.intermediate_size + self.hidden_size) * SCALE_DTYPE.itemsize
        return round(stored / 8) + scales + 2 * (self.num_parameters - experts - drafts)

    @property
    def max_ranks(self) -> int:
        """The most ranks, a power of two, that share heads and columns equally, whatever the groups."""
        ranks = [number for number in fitting_ranks(self.intermediate_size) if self.num_heads % number == 0]
        return max(2**i for i in range(MAX_RANKS.bit_length()) if 2**i in ranks)

    def _fits(self, group_size: int) -> bool:
        return self.hidden_size % group_size == 0 and self.intermediate_size % group_size == 0


MODELS = (
    Model("OLMoE-1B-7B", 16, 64, 2048, 1024, 16, 6_919_161_856),
    Model("Qwen1.5-MoE-A2.7B", 24, 60, 2048, 1408, 16, 14_315_784_192),
    Model("DeepSeek-V2-Lite", 26, 64, 2048, 1408, 16, 15_706_484_224),
    Model("Qwen3-30B-A3B", 48, 128, 2048, 768, 32, 30_532_122_624),
    Model("Phi-3.5-MoE", 32, 16, 4096, 6400, 32, 41_873_153_344),
    Model("Mixtral-8x7B", 32, 8, 4096, 14336, 32, 46_702_792_704),
    Model("Llama-4-Scout", 48, 16, 5120, 8192, 40, 108_641_793_536),
    Model("GLM-4.5-Air", 45, 128, 4096, 1408, 96, 110_468_824_832, draft_layers=1),
    Model("gpt-oss-120b", 36, 128, 2880, 2880, 64, 116_829_156_672),
    Model("MiniMax-M2", 62, 256, 3072, 1536, 48, 228_689_764_864),
    Model("Qwen3-235B-A22B", 94, 128, 4096, 1536, 64, 235_093_634_560),
    Model("DeepSeek-V3", 58, 256, 7168, 2048, 128, 684_489_845_504, draft_layers=1),
)


def gigabytes(nbytes: int) -> str:
    """Of 10^9 bytes, with a decimal below 100."""
    return f"{nbytes / 1e9:.1f}" if nbytes < 99.95e9 else f"{nbytes / 1e9:.0f}"


def table() -> list[str]:
    """The lines of a Markdown table of all models."""
    head = ["GB", "16 bits", *(f"{bits:g} bits" for bits in BITS), "ranks"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
    for model in MODELS:
        sizes = [2 * model.num_parameters, *(model.nbytes(bits, model.group_size) for bits in BITS)]
        lines.append(f"| {' | '.join([model.name, *map(gigabytes, sizes), str(model.max_ranks)])} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
