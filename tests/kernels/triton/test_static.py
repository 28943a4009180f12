"""What the matrix product compiles to, for GPUs that need not be present."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from alphaq_vllm.kernels.triton.tiles import TILES, tiles_for

kernels = pytest.mark.kernels
# Bytes of shared memory that one program may have (CUDA programming guide, table of compute capabilities).
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Integer instructions per weight by group size, width and block_m, as benchmarks.kernels --static defines them. Only to
# be lowered.
CEILINGS = {
    64: {
        80: {
            2: {8: 1.50, 16: 1.75, 32: 2.17, 64: 2.79},
            3: {8: 1.60, 16: 1.75, 32: 2.26, 64: 3.00},
            4: {8: 1.39, 16: 1.58, 32: 1.95, 64: 2.68},
        },
        90: {
            2: {16: 1.29, 32: 1.28, 64: 1.52, 128: 1.64},
            3: {16: 1.39, 32: 1.38, 64: 1.59, 128: 1.71},
            4: {16: 1.22, 32: 1.22, 64: 1.40, 128: 1.53},
        },
        100: {
            2: {16: 1.30, 32: 1.30, 64: 1.57, 128: 1.57},
            3: {16: 1.42, 32: 1.42, 64: 1.67, 128: 1.68},
            4: {16: 1.24, 32: 1.24, 64: 1.49, 128: 1.50},
        },
    },
    128: {
        80: {
            2: {8: 1.40, 16: 1.69, 32: 1.88, 64: 2.67},
            3: {8: 1.52, 16: 1.81, 32: 2.03, 64: 2.88},
            4: {8: 1.30, 16: 1.50, 32: 1.83, 64: 2.59},
        },
        90: {
            2: {16: 1.22, 32: 1.27, 64: 1.34, 128: 1.44},
            3: {16: 1.33, 32: 1.37, 64: 1.47, 128: 1.58},
            4: {16: 1.16, 32: 1.21, 64: 1.30, 128: 1.37},
        },
        100: {
            2: {16: 1.25, 32: 1.29, 64: 1.41, 128: 1.41},
            3: {16: 1.37, 32: 1.41, 64: 1.53, 128: 1.53},
            4: {16: 1.18, 32: 1.25, 64: 1.35, 128: 1.35},
        },
    },
}


def compiled(*arguments: str) -> list[dict]:
    command = [sys.executable, "-m", "benchmarks.kernels", "--static", "--json", *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line) for line in output.splitlines()]


@pytest.mark.parametrize("width", [pytest.param(2, marks=kernels), 3, pytest.param(4, marks=kernels)])
@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("group_size", [64, pytest.param(128, marks=kernels)])
def test_inner_loops_stay_below_the_recorded_ceilings(group_size, sm, width):
    rows = compiled("--sm", str(sm), "--widths", str(width), "--group-size", str(group_size))
    assert {row["block_m"] for row in rows} == {tiles.block_m for tiles in TILES[sm // 10]}
    for row in rows:
        assert row["widths"] == [width]
        assert row["integer_per_weight"] <= CEILINGS[group_size][sm][width][row["block_m"]], row
        assert row["spilled_bytes"] == 0, row
        # Four words of 32 codes are 16 bytes a thread for each bit of the width.
        assert row["wide_loads"] >= width, row
        # Nothing is waited for but copies that were begun some steps earlier.
        assert "LDG" not in row["instructions"], row
        assert "SHFL" not in row["instructions"], row
        assert "STS" not in row["instructions"], row
        assert row["matrix"] == {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[sm]


@kernels
@pytest.mark.parametrize(("sm", "dtype", "widths"), [(89, "fp16", "1,8"), (90, "fp16", "3,5"), (90, "bf16", "6,7,8")])
def test_other_widths_and_dtypes_compile_without_spills(sm, dtype, widths):
    for row in compiled("--sm", str(sm), "--dtype", dtype, "--widths", widths):
        assert row["spilled_bytes"] == 0, row
        assert row["shared_bytes"] <= SHARED_MEMORY[sm], row


@kernels
@pytest.mark.parametrize(
    ("sm", "widths", "projections", "is_down"),
    [
        *((sm, (2, 3, 4), 2, False) for sm in (80, 90, 100, 120)),
        *((sm, (2, 3, 4), 1, False) for sm in (80, 90)),
        (90, (2, 3, 4), 1, True),
        (90, (3, 8), 2, False),
    ],
)
def test_mixed_widths_compile_without_spills(sm, widths, projections, is_down):
    code = (
        "import json\n"
        "from alphaq_vllm.kernels.triton.tiles import tiles_for\n"
        "from benchmarks.sass import compile_gemm\n"
        f"for tiles in tiles_for({sm // 10}, {max(widths)}):\n"
        f"    code = compile_gemm({sm}, 'bf16', tiles, {widths}, 64, {projections}, {is_down})\n"
        "    print(json.dumps(code.as_dict()))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    rows = [json.loads(line) for line in output.splitlines()]
    assert len(rows) == len(tiles_for(sm // 10, max(widths)))
    assert all(row["spilled_bytes"] == 0 for row in rows)
    # The registers that the tiles' table grants are what lets so many run at a time.
    if sm == 90 and max(widths) <= 4:
        granted = {tiles.block_m: tiles.programs for tiles in tiles_for(9, max(widths))}
        assert all(row["programs"] >= granted[row["block_m"]] for row in rows)


COMPILE_ALL_ELSE = """
from itertools import product
from alphaq_vllm.kernels.triton.blocks import direct_blocks_kernel, place_routes_kernel, rank_routes_kernel
from alphaq_vllm.kernels.triton.elementwise import activate_kernel, sum_routes_kernel
from benchmarks.sass import compile_kernel

types = dict.fromkeys(("x_ptr", "out_ptr", "hidden_ptr", "bias_ptr"), "*bf16")
types |= dict.fromkeys(("x_sums_ptr", "partial_ptr", "hidden_sums_ptr", "router_weights_ptr"), "*fp32")
types |= dict.fromkeys(("expert_map_ptr", "expert_ids_ptr", "route_ids_ptr", "last_ranks_ptr", "ranks_ptr"), "*i32")
types |= dict.fromkeys(("limit", "alpha", "beta"), "fp32")
unaligned = ("num_tokens", "num_routes", "num_splits", "num_experts", "limit", "alpha", "beta")
sums = {"GROUP_SIZE": 128, "NUM_GROUPS": 32}
activate = {"IN_PARTS": True, "GROUP_SIZE": 128, "BLOCK": 512}
for sm, (ids, absent) in product((80, 90, 100), (("*i32", ("expert_map_ptr", "bias_ptr")), ("*i64", ()))):
    def compile(kernel, **constants):
        constants |= {name: None for name in absent if name in kernel.arg_names} | {"OVERLAP": sm >= 90}
        compile_kernel(kernel, {**types, "topk_ids_ptr": ids}, constants, unaligned, sm)

    compile(direct_blocks_kernel, **sums, BLOCK_M=16, NUM_ROUTES=256, CHUNK=64)
    compile(rank_routes_kernel, **sums, TOP_K=4, SLOTS=4)
    compile(place_routes_kernel, BLOCK_M=16, NUM_EXPERTS=64, BLOCK=128)
    compile(activate_kernel, **activate, P=2, ACTIVATION="silu", CLAMP=True, MUL_ROUTER_WEIGHT=False)
    whole = activate | {"IN_PARTS": False}
    compile(activate_kernel, **whole, P=2, ACTIVATION="silu", CLAMP=False, MUL_ROUTER_WEIGHT=False)
    compile(activate_kernel, **activate, P=2, ACTIVATION="gelu", CLAMP=False, MUL_ROUTER_WEIGHT=True)
    compile(activate_kernel, **activate, P=2, ACTIVATION="gelu_tanh", CLAMP=False, MUL_ROUTER_WEIGHT=False)
    compile(activate_kernel, **activate, P=2, ACTIVATION="swiglustep", CLAMP=True, MUL_ROUTER_WEIGHT=False)
    compile(activate_kernel, **activate, P=1, ACTIVATION="relu2", CLAMP=False, MUL_ROUTER_WEIGHT=True)
    compile(sum_routes_kernel, TOP_K=3, SLOTS=4, IN_PARTS=True, MUL_ROUTER_WEIGHT=True, BLOCK=256)
    compile(sum_routes_kernel, TOP_K=3, SLOTS=4, IN_PARTS=False, MUL_ROUTER_WEIGHT=True, BLOCK=1024)
"""


@kernels
def test_the_other_kernels_compile():
    subprocess.run([sys.executable, "-c", COMPILE_ALL_ELSE], check=True)
