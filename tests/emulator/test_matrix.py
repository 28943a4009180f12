"""Vectors of matrix instructions, their layouts by PTX's tables, and what must order them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tests.emulator.machine import NotEmulated
from tests.emulator.memory import MemoryFault
from tests.emulator.run import covers, run
from tests.emulator.shared_memory import SharedMemory

BASE = SharedMemory.BASE
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
THREADS = np.arange(128)


def random(kind: str, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Random 16-bit floats: their bits, and their values in float64."""
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator).to(DTYPES[kind])
    return values.view(torch.int16).numpy().view(np.uint16), values.double().numpy()


def pairs(bits: np.ndarray) -> np.ndarray:
    """The last two axes' last one in pairs: 32-bit registers."""
    return np.ascontiguousarray(bits).view(np.uint32)


def fragment_of_a(bits: np.ndarray, threads: np.ndarray) -> dict[str, np.ndarray]:
    """Of ``[16 * warps, 16]``: PTX's a0 to a7, two a register."""
    words, lane, first = pairs(bits), threads % 32, threads // 32 * 16
    return {f"%r{10 + i}": words[first + lane // 4 + i % 2 * 8, lane % 4 + i // 2 * 4] for i in range(4)}


def sums_of(block, names: list[str], threads: np.ndarray) -> np.ndarray:
    """``[16 * warps, n]`` of the accumulators: PTX's d0 to d3 for each eight columns."""
    result = np.zeros((len(threads) // 2, 2 * len(names)), np.float32)
    for i, name in enumerate(names):
        row = threads // 32 * 16 + threads % 32 // 4 + i % 4 // 2 * 8
        result[row, i // 4 * 8 + threads % 4 * 2 + i % 2] = block.registers[name].view(np.float32)
    return result


@covers(*(f"mma.sync.aligned.m16n8k16.row.col.f32.{k}.{k}.f32" for k in DTYPES))
@pytest.mark.parametrize("kind", DTYPES)
def test_mma(kind):
    threads = np.arange(64)
    (a_bits, a), (b_bits, b) = random(kind, 32, 16), random(kind, 8, 16)
    lane = threads % 32
    registers = fragment_of_a(a_bits, threads)
    registers |= {f"%r{20 + i}": pairs(b_bits)[lane // 4, lane % 4 + i * 4] for i in range(2)}
    registers |= {f"%r{i}": np.full(64, i, np.float32).view(np.uint32) for i in range(4)}
    opcode = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    operands = "{%r4, %r5, %r6, %r7}, {%r10, %r11, %r12, %r13}, {%r20, %r21}, {%r0, %r1, %r2, %r3}"
    block = run(f"{opcode} {operands};", registers, threads=64)
    added = np.array([0, 1] * 4) + np.array([0] * 8 + [2] * 8)[:, None]
    expected = a @ b.T + np.tile(added, (2, 1))
    np.testing.assert_allclose(sums_of(block, [f"%r{i}" for i in range(4, 8)], threads), expected, rtol=0, atol=2e-5)
    with pytest.raises(NotEmulated, match="m16n8k8"):
        run(f"{opcode.replace('k16', 'k8')} {operands};", registers, threads=64)


def test_sums_are_float32():
    """1 is lost beside 2^24, which it were not in float64."""
    a, b = np.zeros((16, 16)), np.zeros((8, 16))
    a[:, 0], b[:, 0] = 1, 1
    lane = np.arange(32)
    bits = [torch.tensor(m).to(torch.float16).view(torch.int16).numpy().view(np.uint16) for m in (a, b)]
    registers = fragment_of_a(bits[0], lane) | {
        f"%r{20 + i}": pairs(bits[1])[lane // 4, lane % 4 + i * 4] for i in (0, 1)
    }
    registers["%r0"] = np.float32(2**24).view(np.uint32)
    opcode = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    block = run(
        f"{opcode} {{%r4, %r5, %r6, %r7}}, {{%r10, %r11, %r12, %r13}}, {{%r20, %r21}}, {{%r0, %r0, %r0, %r0}};",
        registers,
    )
    assert (block.registers["%r4"].view(np.float32) == 2**24).all()


def swizzled(bits: np.ndarray) -> dict[str, np.ndarray]:
    """Where and what each of 128 threads stores of ``[16, 16]``: rows of 32 bytes, bit 4 combined with bit 7."""
    words = pairs(bits).reshape(-1)
    address = THREADS * 4
    return {"%r30": (BASE + (address ^ (address >> 7 & 1) << 4)).astype(np.uint32), "%r31": words}


DESCRIPTOR = BASE >> 4 | 256 >> 4 << 32 | 3 << 62
STORE, PROXY, BARRIER = "st.shared.b32 [%r30], %r31;", "fence.proxy.async.shared::cta;", "bar.sync 0;"
NAMES = [f"%r{100 + i}" for i in range(8)]
FENCE, COMMIT, WAIT = (
    "wgmma.fence.sync.aligned;",
    "wgmma.commit_group.sync.aligned;",
    "wgmma.wait_group.sync.aligned 0;",
)


def wgmma(kind: str, a: str = "{%r10, %r11, %r12, %r13}", keep: str = "%p1") -> str:
    return f"wgmma.mma_async.sync.aligned.m64n16k16.f32.{kind}.{kind} {{{','.join(NAMES)}}}, {a}, %d1, {keep}, 1, 1, 0;"


def wgmma_inputs(kind: str):
    (a_bits, a), (b_bits, b) = random(kind, 64, 16), random(kind, 16, 16)
    registers = fragment_of_a(a_bits, THREADS) | swizzled(b_bits) | {"%d1": np.uint64(DESCRIPTOR), "%p1": np.True_}
    registers |= {name: np.full(128, 2, np.float32).view(np.uint32) for name in NAMES}
    return registers, 2 + a @ b.T, a @ b.T


@covers(*(f"wgmma.mma_async.sync.aligned.m64n16k16.f32.{k}.{k}" for k in DTYPES), "fence.proxy.async.shared::cta")
@covers(*(f"wgmma.{name}.sync.aligned" for name in ("fence", "commit_group", "wait_group")))
@pytest.mark.parametrize("kind", DTYPES)
def test_wgmma(kind):
    registers, expected, product = wgmma_inputs(kind)
    # The second one adds to the same sums, which needs no fence.
    block = run("".join([STORE, PROXY, BARRIER, FENCE, wgmma(kind), wgmma(kind), COMMIT, WAIT]), registers, threads=128)
    np.testing.assert_allclose(sums_of(block, NAMES, THREADS), expected + product, rtol=0, atol=4e-5)


USE = "mov.b32 %r1, %r100;"
HAZARDS = {
    "fence.proxy.async": (STORE, BARRIER, FENCE, wgmma("f16"), COMMIT, WAIT),
    "fence.proxy.async since": (STORE, PROXY, BARRIER, STORE, BARRIER, FENCE, wgmma("f16"), COMMIT, WAIT),
    "without a barrier": (STORE, PROXY, FENCE, wgmma("f16"), COMMIT, WAIT),
    "nobody wrote": (PROXY, FENCE, wgmma("f16"), COMMIT, WAIT),
    "without wgmma.fence": (STORE, PROXY, BARRIER, wgmma("f16"), COMMIT, WAIT),
    "fence behind": (STORE, PROXY, BARRIER, FENCE, "mov.b32 %r10, %r11;", wgmma("f16"), COMMIT, WAIT),
    "behind what used": (STORE, PROXY, BARRIER, FENCE, wgmma("f16"), COMMIT, WAIT, USE, wgmma("f16"), COMMIT, WAIT),
    "before the wgmma": (STORE, PROXY, BARRIER, FENCE, wgmma("f16"), COMMIT, USE, WAIT),
    "waited for": (STORE, PROXY, BARRIER, FENCE, wgmma("f16"), WAIT, USE),
    "was waited": (STORE, PROXY, BARRIER, FENCE, wgmma("f16"), COMMIT, WAIT.replace("0", "1"), USE),
    "used before": (STORE, PROXY, BARRIER, FENCE, wgmma("f16"), COMMIT, "mov.b32 %r10, 0;", WAIT),
    "product in flight reads": (STORE, PROXY, BARRIER, FENCE, wgmma("f16"), COMMIT, STORE, WAIT),
    "another thread used": (STORE, PROXY, BARRIER, FENCE, wgmma("f16"), COMMIT, WAIT, STORE),
    "end of a block": (STORE, PROXY, BARRIER, FENCE, wgmma("f16"), COMMIT),
}


@pytest.mark.parametrize("match", HAZARDS)
def test_wgmma_needs_its_fences_and_waits(match):
    with pytest.raises(MemoryFault, match=re.escape(match)):
        run("".join(HAZARDS[match]), wgmma_inputs("f16")[0], threads=128)


def test_forms_of_wgmma_that_are_not_modelled():
    registers = wgmma_inputs("f16")[0]
    with pytest.raises(NotEmulated, match=r"wgmma\.mma_async"):
        run(wgmma("f16").replace(", 1, 1, 0;", ", 1, -1, 0;"), registers, threads=128)
    with pytest.raises(NotEmulated, match="e4m3"):
        run(wgmma("f16").replace("f16.f16", "e4m3.e4m3"), registers, threads=128)
    with pytest.raises(NotEmulated, match=r"fence\.proxy\.alias"):
        run("fence.proxy.alias;", threads=128)
