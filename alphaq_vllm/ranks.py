"""How ranks of tensor parallelism share the columns of a matrix, whatever its groups.

A rank's share may begin or end within a stored group. The rank then sees smaller groups, of which several have the
grid of one stored group. So ranks on both sides of the cut have them, and the checkpoint is left alone.
"""

from __future__ import annotations

import torch

from alphaq_vllm.format import SUPPORTED_GROUP_SIZES

# What a share has to be a multiple of: the smallest groups, and the units of packed codes.
SHARE = min(SUPPORTED_GROUP_SIZES)


def shared_group_size(columns: int, group_size: int) -> int | None:
    """The size of the groups that a rank with ``columns`` columns sees, at most the stored ``group_size``.

    None if there is no such size: the share is not a multiple of ``SHARE``.

    >>> shared_group_size(1408 // 2, 128), shared_group_size(1408 // 4, 128), shared_group_size(1408 // 8, 128)
    (64, 32, None)
    """
    fitting = [size for size in SUPPORTED_GROUP_SIZES if size <= group_size and columns % size == 0]
    return max(fitting, default=None)


def fitting_ranks(columns: int) -> list[int]:
    """Over how many ranks so many columns can be shared.

    >>> fitting_ranks(768)
    [1, 2, 3, 4, 6, 8, 12, 24]
    """
    return [ranks for ranks in range(1, columns // SHARE + 1) if columns % (SHARE * ranks) == 0]


def in_smaller_groups(values: torch.Tensor, stored: int, seen: int) -> torch.Tensor:
    """Values ``[..., groups]`` of groups of ``stored`` columns, for groups of ``seen`` columns.

    Returns ``[..., groups * stored / seen]``.
    """
    return values if stored == seen else values.repeat_interleave(stored // seen, -1)
