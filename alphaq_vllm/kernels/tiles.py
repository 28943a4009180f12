"""Tile sizes and splits as plain functions of shapes, so that the choice never looks at device data."""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    """The routes of one program's tile and its launch options; each warp takes 32 rows of a matrix."""

    block_m: int
    num_warps: int
    num_stages: int

    @property
    def block_n(self) -> int:
        """Rows of a matrix: output features."""
        return 32 * self.num_warps


# By the first digit of the compute capability, ascending in block_m: what compiles for it without a spilled register
# or a shuffle of weights. Shared memory stays under the 99 KiB of sm_86 and sm_89.
TILES_8, TILES_16, TILES_32, TILES_64 = (
    Tiles(block_m=8, num_warps=4, num_stages=4),
    Tiles(block_m=16, num_warps=4, num_stages=4),
    Tiles(block_m=32, num_warps=4, num_stages=3),
    Tiles(block_m=64, num_warps=4, num_stages=3),
)
TILES = {
    8: (TILES_8, TILES_16, TILES_32),
    9: (TILES_16, TILES_32, TILES_64),
    10: (TILES_16, TILES_32),
    12: (TILES_8, TILES_16, TILES_32),
}
OTHER_TILES = (TILES_16, TILES_32)
# Programs that a multiprocessor is given before the columns are no longer split among several.
PROGRAMS_PER_MULTIPROCESSOR = 3


def tiles_for(generation: int, widest: int) -> tuple[Tiles, ...]:
    """What there is to choose from. generation: the first digit of the compute capability. widest: of the widths."""
    tiles = TILES.get(generation, OTHER_TILES)
    # 8-bit codes take two products, and so more registers.
    return tiles if widest < 8 else tuple(t for t in tiles if t.block_m < 64)


def choose_tiles(num_routes: int, num_experts: int, generation: int, widest: int) -> Tiles:
    """The smallest tile that holds half as many routes again as an expert has on average, else the largest.

    Narrow tiles waste no work; wide ones dequantize each weight less often.

    >>> choose_tiles(num_routes=4, num_experts=60, generation=9, widest=4).block_m
    16
    >>> choose_tiles(num_routes=8192, num_experts=8, generation=9, widest=4).block_m
    64
    """
    tiles = tiles_for(generation, widest)
    return next((t for t in tiles if 2 * t.block_m * num_experts >= 3 * num_routes), tiles[-1])


def choose_num_splits(num_tiles: int, num_groups: int, num_multiprocessors: int) -> int:
    """Among how many programs to split the columns of a matrix, so that the chip is full once.

    num_tiles: the most programs without a split. Each part has at least two of the num_groups groups of columns.

    >>> choose_num_splits(num_tiles=88, num_groups=16, num_multiprocessors=132)
    4
    """
    return max(1, min(num_multiprocessors * PROGRAMS_PER_MULTIPROCESSOR // num_tiles, num_groups // 2))
