"""Whether groups of columns fit a model, also when ranks of tensor parallelism share it."""

from __future__ import annotations

from collections.abc import Sequence

from alphaq_vllm.format import SHARD_IDS, SUPPORTED_GROUP_SIZES
from offline.source.families import ExpertMatrix


def check_group_size(group_size: int, matrices: Sequence[ExpertMatrix], tp_size: int = 1) -> None:
    """Raise ValueError unless ``group_size`` is supported and divides the rows of every matrix.

    tp_size: ranks of tensor parallelism that share the columns of every down projection, in whole groups, and the rows
    of every other matrix.
    """
    if group_size not in SUPPORTED_GROUP_SIZES:
        raise ValueError(f"`group_size`: expected one of {SUPPORTED_GROUP_SIZES}, got {group_size}")
    if tp_size < 1:
        raise ValueError(f"`tp_size`: expected a number of ranks from 1 up, got {tp_size}")
    for matrix in matrices:
        side = "in_features" if not _is_split(matrix) or tp_size == 1 else "intermediate_size_per_partition"
        columns = _columns_per_rank(matrix, tp_size)
        if columns is None:
            raise ValueError(
                f"{matrix.name}: intermediate_size={matrix.shape[1]} is not divisible by `tp_size={tp_size}`: "
                "choose a divisor of it"
            )
        if columns % group_size:
            raise ValueError(
                f"{matrix.name}: {side}={columns} is not divisible by group_size={group_size}: "
                + _way_out(matrices, tp_size)
            )


def _is_split(matrix: ExpertMatrix) -> bool:
    return SHARD_IDS[matrix.projection] == "w2"


def _columns_per_rank(matrix: ExpertMatrix, tp_size: int) -> int | None:
    """Columns that one rank holds; None if they cannot be shared equally."""
    if not _is_split(matrix):
        return matrix.shape[1]
    return matrix.shape[1] // tp_size if matrix.shape[1] % tp_size == 0 else None


def _way_out(matrices: Sequence[ExpertMatrix], tp_size: int) -> str:
    columns = {_columns_per_rank(matrix, tp_size) or 1 for matrix in matrices}
    fitting = [group_size for group_size in SUPPORTED_GROUP_SIZES if all(n % group_size == 0 for n in columns)]
    if fitting:
        return f"convert with `group_size={max(fitting)}`" + (" or lower `tp_size`" if tp_size > 1 else "")
    return "no supported group size divides it" + (": lower `tp_size`" if tp_size > 1 else "")
