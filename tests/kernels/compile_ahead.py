"""Compile the Triton kernels for GPUs that need not be present and print what each needs, as JSON lines.

Usage: python compile_ahead.py SM:DTYPE:BLOCK_M:WIDTHS ..., for example 90:bf16:16:234
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from alphaq_vllm.kernels.moe_gemm import moe_gemm_kernel, sum_routes_kernel
from alphaq_vllm.kernels.tiles import TILES

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {
    "packed_ptr": "i32",
    "scales_ptr": "bf16",
    "zero_points_ptr": "fp16",
    "num_bits_ptr": "i32",
    "offsets_ptr": "i64",
    "router_weights_ptr": "fp32",
    "sorted_route_ids_ptr": "i32",
    "expert_ids_ptr": "i32",
    "routed_ptr": "x",
    "x_ptr": "x",
    "out_ptr": "x",
}


def compile_kernel(kernel, sm: int, dtype: str, constants: dict, options: dict) -> dict:
    """Registers per thread, bytes of stack (spills) and of shared memory of one kernel, and how long it took."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = (
                "*" + POINTERS[name].replace("x", dtype) if POINTERS[name] == "x" else "*" + POINTERS[name]
            )
        else:
            signature[name] = "i32"
        # As the launcher finds them: aligned tensors, sizes that are multiples of 16, any number of routes.
        if name not in constants and name != "num_routes":
            attributes[(i,)] = [["tt.divisibility", 16]]
    start = time.perf_counter()
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    seconds = time.perf_counter() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "kernel": kernel.__name__,
        "sm": sm,
        "dtype": dtype,
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "wgmma": "wgmma.mma_async" in compiled.asm["ptx"],
        "seconds": round(seconds, 1),
    }


def compile_case(sm: int, dtype: str, block_m: int, widths: tuple[int, ...]) -> list[dict]:
    """Both matrix products and the sum, as the launcher would start them."""
    tiles = next(tiles for tiles in TILES if tiles.block_m == block_m)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    shared = {
        "GROUP_SIZE": 128,
        "WIDTHS": widths,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
    }
    w13 = {"ROUTES_PER_ROW": 4, "ACTIVATION": "silu", "MUL_ROUTER_WEIGHT": False}
    w2 = {"ROUTES_PER_ROW": 1, "ACTIVATION": None, "MUL_ROUTER_WEIGHT": True}
    rows = []
    for name, constants in (("w13", w13), ("w2", w2)):
        row = compile_kernel(moe_gemm_kernel, sm, dtype, shared | constants, options)
        rows.append(row | {"weights": name, "block_m": block_m, "widths": widths})
    return [*rows, compile_kernel(sum_routes_kernel, sm, dtype, {"TOP_K": 4, "BLOCK_N": 1024}, {})]


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    for case in sys.argv[1:]:
        sm, dtype, block_m, widths = case.split(":")
        for row in compile_case(int(sm), dtype, int(block_m), tuple(map(int, widths))):
            print(json.dumps(row), flush=True)
