"""Vectors of generation 10's matrix instructions, what must order them, and that nothing is without vectors."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.emulator import test_accesses, test_matrix
from tests.emulator.instructions import TABLE
from tests.emulator.machine import NotEmulated
from tests.emulator.memory import MemoryFault
from tests.emulator.run import COVERED, covers, run
from tests.emulator.test_matrix import BARRIER, BASE, DESCRIPTOR, DTYPES, PROXY, STORE, THREADS, pairs, random, swizzled

WARP = THREADS // 32
# Where the address of tensor memory, and the mbarrier, are.
ADDRESS, MBARRIER = BASE + 8192, BASE + 8200
ALLOCATE = (
    f"mov.u32 %r90, %tid.x; setp.lt.u32 %p9, %r90, 32; setp.eq.b32 %p8, %r90, 0;"
    f"@%p9 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r80], 64; {BARRIER} ld.shared.b32 %r81, [%r80];"
    "@%p9 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;"
)
FREE = f"{BARRIER} @%p9 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r81, 64;"
LANES = {"%r80": np.uint32(ADDRESS), "%r82": (WARP << 16 + 5).astype(np.uint32)}
WAIT_ST, WAIT_LD = "tcgen05.wait::st.sync.aligned;", "tcgen05.wait::ld.sync.aligned;"


def names(first: int, count: int) -> str:
    return f"{{{', '.join(f'%r{first + i}' for i in range(count))}}}"


def words(first: int, count: int) -> dict[str, np.ndarray]:
    return {f"%r{first + i}": (THREADS * 100 + i).astype(np.uint32) for i in range(count)}


# Which lane of the warp's 32, and which column, register i of lane t has.
SHAPES = {
    "32x32b": (16, "", lambda t, i: (t, i)),
    "16x32bx2": (8, ", 24", lambda t, i: (t % 16, t // 16 * 24 + i)),
    "16x128b": (8, "", lambda t, i: (t // 4 + i % 2 * 8, i // 2 * 4 + t % 4)),
}


@covers("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32", "tcgen05.dealloc.cta_group::1.sync.aligned.b32")
@covers("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned", WAIT_ST[:-1], WAIT_LD[:-1])
@covers(*(f"tcgen05.{name}.sync.aligned.{shape}.x8.b32" for name in ("ld", "st") for shape in SHAPES))
@pytest.mark.parametrize("shape", SHAPES)
def test_layouts_of_tensor_memory(shape):
    count, split, place = SHAPES[shape]
    repeats = f"{shape}.x{count // (2 if shape == '16x128b' else 1)}"
    store = f"tcgen05.st.sync.aligned.{repeats}.b32 [%r82 + 8]{split}, {names(0, count)};"
    load = f"tcgen05.ld.sync.aligned.{repeats}.b32 {names(20, count)}, [%r82 + 8]{split};"
    seen = {}

    block = run(f"{ALLOCATE} {store} {WAIT_ST} {load} {WAIT_LD} {FREE}", LANES | words(0, count), threads=128)
    for thread in range(128):
        for i in range(count):
            lane, column = place(thread % 32, i)
            seen[thread // 32 * 32 + lane, 8 + column] = thread * 100 + i
    actual = {at: int(block.tensor_memory.words[at]) for at in seen}
    assert actual == seen
    assert len(seen) == 128 * count
    for i in range(count):
        assert (block.registers[f"%r{20 + i}"] == THREADS * 100 + i).all()


def product(kind: str):
    """Registers, expected result and PTX: 128 rows, a row a thread, times 16 columns."""
    (a_bits, a), (b_bits, b) = random(kind, 128, 16), random(kind, 16, 16)
    form = 0x10 | (0x480 if kind == "bf16" else 0) | 16 // 8 << 17 | 128 // 16 << 24
    registers = LANES | swizzled(b_bits) | {f"%r{i}": pairs(a_bits)[:, i] for i in range(8)}
    registers |= {"%d1": np.uint64(DESCRIPTOR | 1 << 46), "%r83": np.uint32(MBARRIER), "%r84": np.uint32(form)}
    parts = {
        "allocate": ALLOCATE,
        "store": STORE,
        "proxy": PROXY,
        "st": f"tcgen05.st.sync.aligned.32x32b.x8.b32 [%r82 + 32], {names(0, 8)};",
        "wait st": WAIT_ST,
        "init": "@%p8 mbarrier.init.shared::cta.b64 [%r83], 1;",
        "barrier": BARRIER,
        "mma": "@%p8 tcgen05.mma.cta_group::1.kind::f16 [%r81 + 0], [%r81 + 32], %d1, %r84, 0;",
        "again": "@%p8 tcgen05.mma.cta_group::1.kind::f16 [%r81 + 0], [%r81 + 32], %d1, %r84, 1;",
        "commit": "@%p8 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r83];",
        "wait": "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r83], 0;",
        "ld": f"tcgen05.ld.sync.aligned.32x32b.x16.b32 {names(20, 16)}, [%r82 + 0];",
        "wait ld": WAIT_LD,
        "barrier behind": BARRIER,
        "inval": "@%p8 mbarrier.inval.shared::cta.b64 [%r83];",
        "free": FREE,
    }
    return registers, a @ b.T, parts


@covers("tcgen05.mma.cta_group::1.kind::f16", "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64")
@covers("mbarrier.init.shared::cta.b64", "mbarrier.inval.shared::cta.b64", "mbarrier.try_wait.parity.shared::cta.b64")
@pytest.mark.parametrize("kind", DTYPES)
def test_products(kind):
    registers, expected, parts = product(kind)
    block = run("".join(parts.values()), registers, threads=128)
    result = np.stack([block.registers[f"%r{20 + i}"].view(np.float32) for i in range(16)], 1)
    np.testing.assert_allclose(result, 2 * expected, rtol=0, atol=4e-5)


@pytest.mark.parametrize(
    ("without", "match"),
    [
        ("proxy", "without fence.proxy.async"),
        ("wait st", "without tcgen05.wait::st"),
        ("init", "mbarrier: none at this address"),
        ("barrier", "without a barrier"),
        ("mma", "nobody wrote"),
        ("commit", "a wait that nothing ends"),
        ("wait", "a tcgen05.mma in flight writes"),
        ("wait ld", "without tcgen05.wait::ld"),
        ("barrier behind", "write to what another thread used"),
        ("free", "before tcgen05.dealloc"),
        ("st", "nobody wrote"),
    ],
)
def test_products_need_their_fences_and_waits(without, match):
    registers, _, parts = product("f16")
    if without == "mma":
        del parts["again"]
    del parts[without]
    with pytest.raises(MemoryFault, match=re.escape(match)):
        run("".join(parts.values()), registers, threads=128)


@pytest.mark.parametrize(
    ("behind", "inserted", "match"),
    [
        ("commit", "st", "a tcgen05.mma in flight reads"),
        ("commit", "store", "write to what a matrix product in flight reads"),
        ("commit", "ld", "a tcgen05.mma in flight writes"),
        ("commit", "free", "a tcgen05.mma in flight"),
        ("wait", "init", "write to what another thread used"),
        ("st", "st", "without tcgen05.wait::st"),
        ("free", "ld", "a column beyond the 0 allocated ones"),
        ("init", "init", "write to an mbarrier"),
    ],
)
def test_what_is_in_flight_may_not_be_used(behind, inserted, match):
    registers, _, parts = product("f16")
    keys = [*parts]
    at = keys.index(behind) + 1
    body = "".join(parts[key] for key in [*keys[:at], inserted, *keys[at:]])
    with pytest.raises(MemoryFault, match=re.escape(match)):
        run(body, registers, threads=128)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "tcgen05.fence::before_thread_sync",
            "tcgen05.fence::after_thread_sync",
            "fence.mbarrier_init.release.cluster",
        ),
        *("tcgen05.cp.cta_group::1.128x256b [%r1], %d1", "mbarrier.arrive.shared.b64 _, [%r1]"),
        "tcgen05.mma.cta_group::2.kind::f16 [%r1], [%r1], %d1, %r1, 0",
    ],
)
def test_what_is_not_modelled_is_refused_by_name(text):
    with pytest.raises(NotEmulated, match=re.escape(text.split()[0])):
        run(f"{text};", {"%r1": np.uint32(0), "%d1": np.uint64(0)})


@pytest.mark.parametrize("pattern", TABLE)
def test_every_instruction_has_vectors(pattern):
    """Those of arithmetic are checked opcode by opcode, in ``test_arithmetic``."""
    assert test_accesses and test_matrix
    assert any(re.fullmatch(pattern, opcode) for opcode in COVERED)
