"""Which tiles are the fastest on this GPU, for the table in ``alphaq_vllm/kernels/tiles.py``.

    python -m benchmarks.tune [--models qwen1.5] [--tokens 1,8,64] [--bits 3.5]

Times every combination of tile width, warps, pipeline stages and programs per multiprocessor that compiles without a
spilled register, and prints the fastest few of each setting beside the table's own choice.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch

from alphaq_vllm.kernels import moe_triton, tiles
from benchmarks.kernels import MODELS, measure_machine, measure_ours, several
from benchmarks.sass import compile_gemm

BLOCK_M = (16, 32, 64)
NUM_WARPS = (4, 8)
NUM_STAGES = (2, 3, 4, 5)
PROGRAMS = (2, 3, 4)


def candidates(sm: int) -> list[tiles.Tiles]:
    """Tiles that neither spill nor ask for more memory than a multiprocessor has."""
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    found = []
    for block_m, num_warps, num_stages in product(BLOCK_M, NUM_WARPS, NUM_STAGES):
        candidate = tiles.Tiles(block_m, num_warps, num_stages)
        code = compile_gemm(sm, "bf16", candidate, (2, 3, 4))
        if not code.spilled_bytes and code.shared_bytes <= limit:
            found.append(candidate)
    return found


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
    default = moe_triton.choose_tiles
    choices = candidates(10 * major + minor)
    for model in arguments.models:
        results: dict[int, list[tuple[float, str]]] = {n: [] for n in arguments.tokens}
        for choice, programs in [(None, tiles.PROGRAMS_PER_MULTIPROCESSOR), *product(choices, PROGRAMS)]:
            moe_triton.choose_tiles = default if choice is None else lambda *_, choice=choice: choice
            tiles.PROGRAMS_PER_MULTIPROCESSOR = programs
            rows = measure_ours(MODELS[model], arguments.tokens, arguments.bits, machine, arguments.seconds)
            for row in rows:
                name = "the table's" if choice is None else f"{choice}, {programs} programs per multiprocessor"
                results[row["tokens"]].append((row.get("us", float("inf")), name))
        for n, timed in results.items():
            print(f"{model} {n} tokens: {timed[0][0]:.1f} us with {timed[0][1]}")
            for us, name in sorted(timed)[:3]:
                print(f"    {us:9.1f} us with {name}", flush=True)


if __name__ == "__main__":
    main()
