"""Which tiles are the fastest on this GPU, for the table in ``alphaq_vllm/kernels/triton/tiles.py``.

    python -m benchmarks.tune [--models qwen1.5] [--tokens 1,8,64] [--bits 3.5]

Times tiles of about the size that the table would choose, with other numbers of routes, warps, pipeline stages and
registers, and with the columns split among other numbers of programs, and prints the fastest few of each setting beside
the table's own choice. Tiles that do not compile, ask for more memory than there is or give a wrong result are left
out. They are compiled by as many processes as there are cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import product
from multiprocessing import get_context

import torch

from alphaq_vllm.cores import available_cores
from alphaq_vllm.kernels import MoEWeights, Routing, fused_moe, repack_
from alphaq_vllm.kernels.triton import layer
from alphaq_vllm.kernels.triton.tiles import WIDEST_OF_LARGEST_TILES, Tiles
from benchmarks.kernels import MODELS, Shape, random_experts, random_inputs, random_layer, several

# Block_m, and whether weights are scaled before the product: see ``alphaq_vllm/kernels/triton/gemm.py``.
BLOCKS = ((8, False), (16, False), (32, False), (32, True), (64, True), (128, True))
NUM_STAGES = (2, 3, 4, 5)
# By warps: with fewer registers one more program fits a multiprocessor.
MAXNREG = {4: (None, 168, 128), 8: (None, 128)}
WARPS = (8, 12, 16)


def candidates(generation: int, stages: Sequence[int]) -> list[Tiles]:
    """All that may be of use on a GPU. generation: the major number of its compute capability."""
    # What takes both operands from shared memory or tensor memory has at least 16 columns.
    blocks = [block for block in BLOCKS if block[0] >= 16 or generation in (8, 12)]
    return [
        Tiles(block_m, num_warps, num_stages, 1, scale_weights, maxnreg, 8 if block_m >= 128 else 1)
        for (block_m, scale_weights), num_warps, num_stages in product(blocks, MAXNREG, stages)
        for maxnreg in MAXNREG[num_warps]
    ]


@contextmanager
def tiles_set(choice: Tiles) -> Iterator[None]:
    """Every layer takes these tiles."""
    chosen = layer.choose_tiles
    layer.choose_tiles = lambda *_: choice
    try:
        yield
    finally:
        layer.choose_tiles = chosen


def compiles(shape: Shape, bits: float, choice: Tiles) -> bool:
    """Whether tiles run: in a process of its own, whose compiled kernels the others find in Triton's cache."""
    few = shape._replace(num_experts=shape.top_k + 1)
    sizes = (few.intermediate_size, few.hidden_size)
    stored = (random_experts(few.num_experts, 2, *sizes, bits), random_experts(few.num_experts, 1, *sizes[::-1], bits))
    weights = MoEWeights(*(repack_(experts) for experts in stored))
    # Few routes are summed in float32, many in x's dtype: two kernels.
    tokens = 2 if choice.block_m <= 32 else layer.MAX_DIRECT_ROUTES // few.top_k + 1
    try:
        with tiles_set(choice):
            x, *router = random_inputs(few, tokens)
            fused_moe(x, weights, Routing(*router))
            torch.cuda.synchronize()
    except Exception as error:
        print(f"{choice}: {type(error).__name__}: {str(error)[:100]}", flush=True)
        return False
    return True


def main() -> None:
    """Parse arguments, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=several(str), default=list(MODELS))
    parser.add_argument("--tokens", type=several(int), default=[1, 8, 64, 256, 4096])
    parser.add_argument("--bits", type=float, default=3.5)
    parser.add_argument("--stages", type=several(int), default=NUM_STAGES)
    parser.add_argument("--seconds", type=float, default=0.03, help="of replays for each setting")
    parser.add_argument("--best", type=int, default=3, help="how many to print")
    arguments = parser.parse_args()
    generation, _ = torch.cuda.get_device_capability()
    for model in arguments.models:
        shape = MODELS[model]
        usual = {
            n: layer.choose_tiles(n * shape.top_k, shape.num_experts, generation, WIDEST_OF_LARGEST_TILES)
            for n in arguments.tokens
        }
        near = {
            n: [
                t
                for t in candidates(generation, arguments.stages)
                if t.block_m <= 2 * own.block_m and own.block_m <= 2 * t.block_m
            ]
            for n, own in usual.items()
        }
        every = list(dict.fromkeys(t for some in near.values() for t in some))
        with ProcessPoolExecutor(available_cores(), mp_context=get_context("spawn")) as pool:
            results = pool.map(compiles, *zip(*((shape, arguments.bits, t) for t in every), strict=True))
            running = {t for t, runs in zip(every, results, strict=True) if runs}
        timed = random_layer(shape, arguments.tokens, arguments.bits)
        for n, own in usual.items():
            # More routes than that are never split.
            splits = WARPS if n * shape.top_k <= layer.MAX_DIRECT_ROUTES else (0,)
            choices = [t._replace(programs=w // t.num_warps) for t, w in product(near[n], splits) if t in running]
            times: dict[Tiles, float] = {}
            # A few at a time, for each holds its graph's memory; the table's own in each, to compare with.
            for i in range(0, len(choices), 8):
                some = [own, *(t for t in choices[i : i + 8] if t != own)]
                measured = timed.time(n, arguments.seconds, [partial(tiles_set, choice) for choice in some])
                if measured[0] is None:
                    raise RuntimeError(f"{model}, {n} tokens: a wrong result with the table's {own}")
                own_us = times.setdefault(own, measured[0])
                times |= {t: us * own_us / measured[0] for t, us in zip(some, measured, strict=True) if us is not None}
            print(f"{model} {n} tokens: {times[own]:.1f} us with the table's {own}")
            for choice in sorted(times, key=times.__getitem__)[: arguments.best]:
                print(f"    {times[choice]:9.1f} us with {choice}", flush=True)


if __name__ == "__main__":
    main()
