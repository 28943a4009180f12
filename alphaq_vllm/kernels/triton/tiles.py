"""Tile sizes and splits as plain functions of shapes, so that the choice never looks at device data."""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    """The routes of one program's tile and its launch options; each warp takes 32 rows of a matrix.

    programs: how many run on a multiprocessor at a time, so that the columns of few rows are split among that many.
    scale_weights: steps are applied to weights, not to products: see ``gemm``. maxnreg: registers that a thread may
    have, where the compiler by itself leaves room for another number of programs than is best. blocks_together: how
    many blocks of routes take the same weights after one another, while these are in the L2 cache.
    """

    block_m: int
    num_warps: int
    num_stages: int
    programs: int
    scale_weights: bool = False
    maxnreg: int | None = None
    blocks_together: int = 1

    @property
    def block_n(self) -> int:
        """Rows of a matrix: output features."""
        return 32 * self.num_warps


# By the major number of the compute capability, ascending in block_m: what compiles for it without a spilled register
# or a shuffle of weights. On generations 8 and 12 shared memory stays under the 99 KiB of sm_86, sm_89 and sm_120.
TILES_8, TILES_16, TILES_32, TILES_64 = (
    Tiles(block_m=8, num_warps=4, num_stages=3, programs=3),
    Tiles(block_m=16, num_warps=4, num_stages=4, programs=3),
    Tiles(block_m=32, num_warps=4, num_stages=3, programs=3),
    Tiles(block_m=64, num_warps=4, num_stages=3, programs=3, scale_weights=True),
)
# The more rows and routes a tile has, the less often the other operand is read. With 256 and 128 the matrix units of an
# H200 ask for about what its L2 cache is said to deliver, with 128 and 64 for twice as much.
TILES_64_WIDE, TILES_128_WIDE = (
    Tiles(block_m=64, num_warps=8, num_stages=3, programs=1, scale_weights=True),
    Tiles(block_m=128, num_warps=8, num_stages=3, programs=1, scale_weights=True, blocks_together=8),
)
TILES_16_OF_4 = TILES_16._replace(programs=4, maxnreg=128)
TILES_32_OF_3 = TILES_32._replace(maxnreg=168)
TILES_64_OF_2 = TILES_64_WIDE._replace(programs=2, maxnreg=128)
TILES = {
    8: (TILES_8, TILES_16, TILES_32, TILES_64),
    9: (TILES_16_OF_4, TILES_32_OF_3, TILES_64_OF_2, TILES_128_WIDE),
    10: (TILES_16_OF_4, TILES_32_OF_3, TILES_64._replace(maxnreg=128), TILES_128_WIDE),
    12: (TILES_8, TILES_16, TILES_32_OF_3, TILES_64._replace(maxnreg=255)),
}
# Up to how many routes per expert, on average, each block_m is used. Every block unpacks its expert's weights, and an
# expert's last block is half empty. Up to 32 routes unpacking takes more time than products, so a tile is used until
# second blocks cost as much as the next tile; from 64 on products take the time, those of padding too.
ROUTES_PER_EXPERT = {8: 5, 16: 11, 32: 40, 64: 192}
# The words of wider codes take registers that these leave no room for.
WIDEST_OF_LARGEST_TILES = 4
OTHER_TILES = (TILES_16, TILES_32, TILES_64)


def tiles_for(generation: int, widest: int) -> tuple[Tiles, ...]:
    """What there is to choose from. generation: the major number of the compute capability. widest: of the widths."""
    tiles = TILES.get(generation, OTHER_TILES)
    if widest <= WIDEST_OF_LARGEST_TILES:
        return tiles
    return tuple(TILES_64_WIDE if t.num_warps == 8 else t for t in tiles if t.block_m < 128)


def choose_tiles(num_routes: int, num_experts: int, generation: int, widest: int) -> Tiles:
    """The smallest tile that is meant for so many routes per expert, else the largest.

    >>> choose_tiles(num_routes=4, num_experts=60, generation=9, widest=4).block_m
    16
    >>> choose_tiles(num_routes=8192, num_experts=8, generation=9, widest=4).block_m
    128
    """
    tiles = tiles_for(generation, widest)
    return next((t for t in tiles if num_routes <= num_experts * ROUTES_PER_EXPERT.get(t.block_m, 0)), tiles[-1])


def choose_slabs_per_split(num_tiles: int, num_slabs: int, num_programs: int) -> int:
    """How many slabs of columns one program takes; they are split among several only so that the chip is full once.

    num_tiles: the most programs without a split. num_slabs: of a matrix; a program takes about two or more.
    num_programs: that run at a time.

    >>> choose_slabs_per_split(num_tiles=88, num_slabs=16, num_programs=528)
    3
    """
    num_splits = max(1, min(num_programs // num_tiles, num_slabs // 2))
    return -(-num_slabs // num_splits)
