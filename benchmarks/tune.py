"""Which tiles are the fastest on this GPU, for the table in ``alphaq_vllm/kernels/triton/tiles.py``.

    python -m benchmarks.tune [--models qwen1.5] [--tokens 1,8,64] [--bits 3.5]

Times tiles of about the size that the table would choose, with other numbers of routes, warps, pipeline stages,
registers and warps per multiprocessor, if they compile without a spilled register, and prints the fastest few of each
setting beside the table's own choice.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context

import torch

from alphaq_vllm.kernels.triton import layer, tiles
from benchmarks.kernels import MODELS, measure_machine, measure_ours, several
from benchmarks.sass import KernelCode, compile_gemm

# Block_m, and whether weights are scaled before the product: see ``alphaq_vllm/kernels/triton/gemm.py``.
BLOCKS = ((8, False), (16, False), (32, False), (32, True), (64, True), (128, True))
NUM_WARPS = (4, 8)
NUM_STAGES = (2, 3, 4, 5)
MAXNREG = (None, 168, 128)
WARPS_PER_MULTIPROCESSOR = (8, 12, 16)


def _compile(sm: int, candidate: tiles.Tiles) -> KernelCode | None:
    try:
        return compile_gemm(sm, "bf16", candidate, (2, 3, 4))
    except Exception as error:
        print(f"{candidate} does not compile: {type(error).__name__}", flush=True)
        return None


def candidates(sm: int) -> list[tiles.Tiles]:
    """Tiles that neither spill nor ask for more memory than a multiprocessor has; fewer registers must be of use."""
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    # What takes both operands from shared memory or tensor memory has at least 16 columns.
    blocks = [block for block in BLOCKS if block[0] >= 16 or sm // 10 in (8, 12)]
    possible = [
        tiles.Tiles(block_m, num_warps, num_stages, scale_weights, maxnreg)
        for (block_m, scale_weights), num_warps, num_stages, maxnreg in product(blocks, NUM_WARPS, NUM_STAGES, MAXNREG)
    ]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        results = zip(possible, pool.map(partial(_compile, sm), possible), strict=True)
        compiled = {tile: code for tile, code in results if code}
    return [
        t
        for t, code in compiled.items()
        if not code.spilled_bytes
        and code.shared_bytes <= limit
        and (t.maxnreg is None or code.programs != compiled[t._replace(maxnreg=None)].programs)
    ]


def main() -> None:
    """Parse arguments, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=several(str), default=list(MODELS))
    parser.add_argument("--tokens", type=several(int), default=[1, 8, 64, 256, 4096])
    parser.add_argument("--bits", type=float, default=3.5)
    parser.add_argument("--seconds", type=float, default=0.03, help="of replays for each setting")
    arguments = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    machine = measure_machine()
    default, default_warps = layer.choose_tiles, tiles.WARPS_PER_MULTIPROCESSOR
    choices = candidates(10 * major + minor)
    for model, num_tokens in product(arguments.models, arguments.tokens):
        shape = MODELS[model]
        usual = default(num_tokens * shape.top_k, shape.num_experts, major, 4)
        near = [t for t in choices if usual.block_m <= 2 * t.block_m and t.block_m <= 2 * usual.block_m]
        results = []
        for choice, warps in [(None, default_warps), *product(near, WARPS_PER_MULTIPROCESSOR)]:
            layer.choose_tiles = default if choice is None else lambda *_, choice=choice: choice
            tiles.WARPS_PER_MULTIPROCESSOR = warps
            (row,) = measure_ours(shape, [num_tokens], arguments.bits, machine, arguments.seconds)
            name = "the table's" if choice is None else f"{choice}, {warps} warps per multiprocessor"
            results.append((row.get("us", float("inf")), name))
        print(f"{model} {num_tokens} tokens: {results[0][0]:.1f} us with {results[0][1]}")
        for us, name in sorted(results)[:3]:
            print(f"    {us:9.1f} us with {name}", flush=True)


if __name__ == "__main__":
    main()
