"""What the Triton kernels compile to, for GPUs that need not be present: read from the machine code itself."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from alphaq_vllm.kernels.triton.devices import Device
from alphaq_vllm.kernels.triton.gemm import moe_gemm_kernel
from alphaq_vllm.kernels.triton.tiles import Tiles

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "x_sums_ptr": "*fp32",
    "out_ptr": "*fp32",
    "packed_ptr": "*i32",
    "scales_ptr": "*bf16",
    "grids_ptr": "*u8",
    "num_bits_ptr": "*i32",
    "offsets_ptr": "*i64",
    "expert_ids_ptr": "*i32",
    "route_ids_ptr": "*i32",
}
# Instructions of each thread's integer and conversion units; uniform ones (U...) run once per warp beside them.
INTEGER = re.compile(
    r"(LOP3|SHF|SHL|SHR|PRMT|IMAD|IADD\w*|VIADD\w*|LEA|SEL|ISETP|IMNMX|VIMNMX|MOV|BFE|BMSK|SGXT|LOP|I2F\w*|F2I\w*|F2F\w*)$"
)
# Of a slab, as most matrices are read.
COLUMNS = 128
MATRIX = re.compile(r"(HMMA|HGMMA|UTCHMMA|UTCMMA)$")


@dataclass
class KernelCode:
    """One compiled kernel. Of its inner loop, per thread: integer instructions per weight, and instruction counts.

    programs: how many fit a multiprocessor, by their registers and shared memory.
    """

    sm: int
    dtype: str
    block_m: int
    widths: tuple[int, ...]
    programs: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    integer_per_weight: float = 0.0
    wide_loads: int = 0
    matrix: str = ""
    instructions: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def compile_kernel(kernel, signature: dict[str, str], constants: dict, unaligned: tuple[str, ...], sm: int, **options):
    """Compile for a target as the launcher would find its arguments: aligned, but for some, and multiples of 16."""
    types = {name: "constexpr" if name in constants else signature.get(name, "i32") for name in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in constants and name not in unaligned
    }
    source = ASTSource(kernel, types, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def compile_gemm(
    sm: int,
    dtype: str,
    tiles: Tiles,
    widths: tuple[int, ...],
    group_size: int,
    projections: int = 2,
    is_down: bool = False,
) -> KernelCode:
    """The matrix product. dtype: bf16 or fp16. sm: compute capability, two digits or three.

    projections: 2 for gate and up, 1 for up alone and for down (is_down).
    """
    constants = {
        "ROUTES_PER_ROW": 1 if is_down else 2,
        "P": projections,
        "IS_DOWN": is_down,
        "GROUP_SIZE": group_size,
        "COLUMNS": COLUMNS,
        "WIDTHS": widths,
        "QUADS": Device(1, sm // 10).quads,
        "SCALE_WEIGHTS": tiles.scale_weights,
        "PTX": True,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "NUM_STAGES": tiles.num_stages,
        "BLOCKS_TOGETHER": tiles.blocks_together,
        "OVERLAP": sm >= 90,
    }
    if tiles.scale_weights:
        constants["x_sums_ptr"] = None
    signature = {**POINTERS, "x_ptr": f"*{dtype}"}
    compiled = compile_kernel(
        moe_gemm_kernel, signature, constants, ("num_routes", "slabs_per_split", "bias"), sm,
        num_warps=tiles.num_warps, maxnreg=tiles.maxnreg, enable_fp_fusion=True,
    )  # fmt: skip
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    shared = compiled.metadata.shared
    programs = programs_per_multiprocessor(sm, tiles.num_warps, int(registers), shared)
    result = KernelCode(sm, dtype, tiles.block_m, widths, programs, int(registers), int(stack), shared)
    if len(widths) == 1:
        weights = tiles.block_n * COLUMNS // (32 * tiles.num_warps)
        body = inner_loop(code, weights // 2)
        opcodes = Counter(instruction.split(".")[0] for instruction in body)
        result.integer_per_weight = sum(n for op, n in opcodes.items() if INTEGER.match(op)) / weights
        result.wide_loads = sum(bool(re.match(r"(LDG|LDGSTS)\b.*\.128", instruction)) for instruction in body)
        result.matrix = next(op for op in opcodes if MATRIX.match(op))
        result.instructions = dict(opcodes.most_common())
    return result


def programs_per_multiprocessor(sm: int, num_warps: int, registers: int, shared_bytes: int) -> int:
    """By the CUDA programming guide's table of compute capabilities; registers are granted to a warp by 256.

    >>> programs_per_multiprocessor(sm=90, num_warps=4, registers=168, shared_bytes=45312)
    3
    """
    shared = {80: 164, 86: 100, 87: 164, 89: 100, 120: 100, 121: 100}.get(sm, 228) * 1024
    return min(65536 // (-(-registers * 32 // 256) * 256 * num_warps), shared // (shared_bytes + 1024))


def inner_loop(code: str, pairs: int) -> list[str]:
    """The instructions of the smallest loop that multiplies matrices and masks out that many pairs of weights.

    A jump right behind another is not the end of one: it leads back from where a loop waits, behind all other code.
    """
    lines = code.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\.L_x_\d+):", line))}
    bodies = []
    for end, line in enumerate(lines):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], end) < end and "BRA" not in lines[end - 1]:
            found = (re.search(r"\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", x) for x in lines[labels[jump[1]] : end + 1])
            body = [match[1] for match in found if match]
            opcodes = [instruction.split(".")[0] for instruction in body]
            if opcodes.count("LOP3") >= pairs and any(MATRIX.match(op) for op in opcodes):
                bodies.append(body)
    return min(bodies, key=len)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout
