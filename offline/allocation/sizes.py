"""Budgets given as sizes: of the whole checkpoint, or of the memory that it is to be served in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from alphaq_vllm.format import stored_bits_per_weight
from offline.progress import format_bytes

# vLLM itself leaves a tenth of a GPU's memory alone; as much again is for KV cache and activations.
RESERVED_SHARE = Fraction(1, 5)


@dataclass(frozen=True)
class Room:
    """What a converted checkpoint may take, in bytes.

    field: of the options, that set it; limit: bytes; reserve: bytes of memory that are left free beside the tensors,
    None if the limit is of all files instead.
    """

    field: str
    limit: int
    reserve: int | None = None

    @property
    def in_memory(self) -> bool:
        """Whether the limit is of the tensors, which are what is loaded, rather than of all files."""
        return self.reserve is not None

    def __str__(self) -> str:
        if self.reserve is None:
            return f"{format_bytes(self.limit)} for all files"
        return (
            f"{format_bytes(self.limit)} for the weights, and {format_bytes(self.reserve)} reserved for KV cache, "
            "activations and vLLM itself"
        )

    def average_bits(self, others: int, numel: int, group_size: int, least: int, greatest: int) -> float:
        """The average width that fills the room, at most ``greatest``, rounded down.

        others: bytes of everything but the quantized experts; numel: weights of those; least: the least candidate.
        Raises ValueError if the least candidate does not fit.
        """
        overhead = Fraction(stored_bits_per_weight(0, group_size))
        bits = Fraction(8 * (self.limit - others), numel) - overhead
        if bits < least:
            needed = others + math.ceil(numel * (least + overhead) / 8)
            raise ValueError(
                f"`{self.field}`: expected room for at least {format_bytes(needed)}, which is what the experts take at "
                f"{least} bits ({format_bytes(needed - others)}) and all that is not quantized "
                f"({format_bytes(others)}), got {format_bytes(self.limit)}: allow more, lower `candidate_bits`, or "
                "exclude less"
            )
        return min(float(greatest), math.floor(bits * 10**9) / 10**9)


def target_size(nbytes: int) -> Room:
    """Room for the files of a checkpoint."""
    return Room("target_size", nbytes)


def fit_memory(memory: int, reserve: int | None) -> Room:
    """Room for the weights in ``memory`` bytes, all GPUs together.

    reserve: bytes for KV cache, activations and vLLM itself, by default a fifth of the memory.
    Raises ValueError if the reserve leaves nothing.
    """
    reserve = math.ceil(memory * RESERVED_SHARE) if reserve is None else reserve
    if reserve >= memory:
        raise ValueError(
            f"`reserve`: expected less than the memory of {format_bytes(memory)}, got {format_bytes(reserve)}"
        )
    return Room("fit_memory", memory - reserve, reserve)
