"""Whether groups of columns fit a model, and whether ranks of tensor parallelism can share it."""

from __future__ import annotations

from collections.abc import Sequence

from alphaq_vllm.format import SHARD_IDS, SUPPORTED_GROUP_SIZES
from alphaq_vllm.ranks import SHARE, fitting_ranks
from offline.source.families import ExpertMatrix


def check_group_size(group_size: int, matrices: Sequence[ExpertMatrix], tp_size: int = 1) -> None:
    """Raise ValueError unless ``group_size`` is supported and divides the rows of every matrix.

    tp_size: ranks of tensor parallelism that share the columns of every down projection, whatever its groups, and the
    rows of every other matrix.
    """
    if group_size not in SUPPORTED_GROUP_SIZES:
        raise ValueError(f"`group_size`: expected one of {SUPPORTED_GROUP_SIZES}, got {group_size}")
    if tp_size < 1:
        raise ValueError(f"`tp_size`: expected a number of ranks from 1 up, got {tp_size}")
    for matrix in matrices:
        columns = matrix.shape[1]
        if columns % group_size:
            raise ValueError(
                f"{matrix.name}: in_features={columns} is not divisible by group_size={group_size}: "
                + _way_out(matrices)
            )
        if SHARD_IDS[matrix.projection] == "w2" and columns % (SHARE * tp_size):
            raise ValueError(
                f"{matrix.name}: intermediate_size={columns} over `tp_size={tp_size}` ranks is {columns / tp_size:g} "
                f"each, which is not divisible by {SHARE}: choose one of {fitting_ranks(columns)}, or serve with "
                "expert parallelism, which needs no `tp_size`"
            )


def _way_out(matrices: Sequence[ExpertMatrix]) -> str:
    fitting = [size for size in SUPPORTED_GROUP_SIZES if all(matrix.shape[1] % size == 0 for matrix in matrices)]
    return f"convert with `group_size={max(fitting)}`" if fitting else "no supported group size divides it"
