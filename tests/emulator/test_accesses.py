"""Vectors of loads, stores, copies, barriers, and what warps do together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.emulator.machine import NotEmulated
from tests.emulator.memory import MemoryFault
from tests.emulator.run import covers, run
from tests.emulator.shared_memory import SharedMemory

LANES = np.arange(32, dtype=np.uint32)
BASE = SharedMemory.BASE


@covers("ld.global.b32", "st.global.b32", "ld.global.v4.b32", "st.global.v2.b16", "ld.volatile.global.b32")
def test_global_memory():
    source, target = torch.arange(128, dtype=torch.int32), torch.zeros(256, dtype=torch.int16)
    addresses = {
        "%d1": source.data_ptr() + LANES.astype(np.uint64) * 16,
        "%d2": target.data_ptr() + LANES.astype(np.uint64) * 4,
    }
    block = run(
        "ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%d1 + 0]; ld.volatile.global.b32 %r4, [%d1 + 4];"
        "ld.global.b32 %r5, [%d1 + 12]; mov.b32 {%h0, %h1}, %r5; st.global.v2.b16 [%d2 + 0], {%h0, %h1};"
        "st.global.b32 [%d2 + 128], %r1;",
        addresses,
        tensors=(source, target),
    )
    for i in range(4):
        assert block.registers[f"%r{i}"].tolist() == (4 * LANES + i).tolist()
    assert block.registers["%r4"].tolist() == (4 * LANES + 1).tolist()
    assert target[:64:2].tolist() == (4 * LANES + 3).tolist()
    assert target[64:128:2].tolist() == (4 * LANES + 1).tolist()


@covers("prefetch.global.L2")
def test_prefetches_must_be_in_bounds():
    tensor = torch.zeros(4)
    run("prefetch.global.L2 [%d1];", {"%d1": np.uint64(tensor.data_ptr())}, tensors=(tensor,))
    with pytest.raises(MemoryFault, match="outside of every tensor"):
        run("prefetch.global.L2 [%d1];", {"%d1": np.uint64(tensor.data_ptr() + 16)}, tensors=(tensor,))


@covers("atom.global.gpu.relaxed.add.u32")
def test_atomics_add_one_after_another():
    tensor = torch.zeros(1, dtype=torch.int32)
    registers = {"%d1": np.uint64(tensor.data_ptr()), "%r1": LANES}
    block = run("atom.global.gpu.relaxed.add.u32 %r0, [%d1], %r1;", registers, tensors=(tensor,))
    assert tensor.item() == LANES.sum()
    assert block.registers["%r0"].tolist() == (np.cumsum(LANES) - LANES).tolist()


@covers("ld.param.b64")
def test_parameters():
    block = run("ld.param.b64 %d0, [x];", arguments={"x": np.uint64(7)})
    assert block.registers["%d0"].tolist() == [7] * 32


@covers("st.shared.v4.b32", "ld.shared.b8", "ld.shared.b64", "st.shared::cta.b32", "bar.sync", "barrier.sync")
@pytest.mark.parametrize("barrier", ["bar.sync", "barrier.sync"])
def test_shared_memory_is_ordered_by_barriers(barrier):
    registers = {
        "%r1": BASE + np.arange(64, dtype=np.uint32) * 16,
        "%r2": BASE + np.arange(64, dtype=np.uint32)[::-1] * 16,
    }
    store, load = (
        "st.shared.v4.b32 [%r1], {%r1, %r2, %r1, %r2};",
        "ld.shared.b64 %d1, [%r2+8]; ld.shared.b8 %h1, [%r2];",
    )
    block = run(f"{store} {barrier} 0; {load} {barrier} 0; st.shared::cta.b32 [%r1], %r2;", registers, threads=64)
    assert block.registers["%d1"].tolist() == ((registers["%r1"].astype(np.uint64) << 32) + registers["%r2"]).tolist()
    assert block.registers["%h1"].tolist() == (registers["%r2"] & 255).tolist()
    with pytest.raises(MemoryFault, match="read of what another thread wrote, without a barrier"):
        run(f"{store} {load}", registers, threads=64)
    with pytest.raises(MemoryFault, match="write to what another thread used, without a barrier"):
        run(f"{store} {barrier} 0; {load} st.shared.b32 [%r1], %r2;", registers, threads=64)
    with pytest.raises(MemoryFault, match="some threads have ended"):
        run(f"setp.lt.u32 %p1, %r1, {BASE + 512}; @%p1 {barrier} 0;", registers, threads=64)


@pytest.mark.parametrize(
    "text", ["bar.sync 1", "bar.sync 0, 32", "barrier.sync 3, 64", "bar.warp.sync -1", "bar.arrive 0, 64"]
)
def test_other_barriers_are_refused_by_name(text):
    with pytest.raises(NotEmulated, match=text.split()[0]):
        run(f"{text};")


def test_lanes_of_a_warp_are_not_in_step():
    registers = {"%r1": BASE + LANES * 4, "%r2": BASE + (LANES ^ 1) * 4}
    with pytest.raises(MemoryFault, match="read of what another thread wrote"):
        run("st.shared.b32 [%r1], %r1; ld.shared.b32 %r3, [%r2];", registers)
    with pytest.raises(MemoryFault, match=r"bar\.sync by a part of a warp"):
        run(f"setp.lt.u32 %p1, %r1, {BASE + 64}; @%p1 bar.sync 0;", registers)


@covers("cp.async.ca.shared.global", "cp.async.cg.shared.global", "cp.async.commit_group", "cp.async.wait_group")
def test_copies_arrive_when_their_group_was_waited_for():
    source = torch.arange(256, dtype=torch.int32)
    registers = {
        "%r1": BASE + LANES * 16,
        "%d1": source.data_ptr() + LANES.astype(np.uint64) * 16,
        "%r4": LANES % 2 * 4,
    }
    first = "cp.async.cg.shared.global [%r1 + 0], [%d1 + 0], 0x10; cp.async.commit_group;"
    # Of the second, odd threads copy 4 bytes, even ones get zeros.
    second = "cp.async.ca.shared.global [%r1 + 1024], [%d1 + 512], 0x4, %r4; cp.async.commit_group;"
    block = run(
        f"{first} {second} cp.async.wait_group 1; ld.shared.b32 %r2, [%r1+4];"
        "cp.async.wait_group 0; ld.shared.b32 %r3, [%r1+1024];",
        registers,
        tensors=(source,),
    )
    assert block.registers["%r2"].tolist() == (4 * LANES + 1).tolist()
    assert block.registers["%r3"].tolist() == np.where(LANES % 2, 128 + 4 * LANES, 0).tolist()
    late = "read of bytes still in flight"
    for body, match in (
        (f"{first} {second} cp.async.wait_group 2; ld.shared.b32 %r2, [%r1];", late),
        (f"{first} {second} cp.async.wait_group 1; ld.shared.b32 %r2, [%r1+1024];", late),
        (f"{first.split(' cp')[0]} cp.async.wait_group 0; ld.shared.b32 %r2, [%r1];", late),
        (f"{first} st.shared.b32 [%r1], %r1;", "write to bytes still in flight"),
        (f"{first} {first}", "write to bytes still in flight"),
    ):
        with pytest.raises(MemoryFault, match=match):
            run(body, registers, tensors=(source,))


@covers("griddepcontrol.wait", "griddepcontrol.launch_dependents")
def test_dependent_launches():
    run("griddepcontrol.wait; griddepcontrol.launch_dependents;", early=True)
    with pytest.raises(MemoryFault, match=r"before griddepcontrol\.wait"):
        run("griddepcontrol.launch_dependents;", early=True)


@covers("ldmatrix.sync.aligned.m8n8.x4.shared.b16", "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16")
@covers("stmatrix.sync.aligned.m8n8.x4.shared.b16", "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16")
@pytest.mark.parametrize("load", ["", ".trans"])
@pytest.mark.parametrize("store", ["", ".trans"])
def test_matrices_of_eight_rows(load, store):
    rng = np.random.default_rng(0)
    matrices = rng.integers(0, 1 << 16, (4, 8, 8), dtype=np.uint16)
    # Of a matrix, lane t holds columns 2 * (t % 4) and the next of row t // 4.
    words = {f"%r{m}": np.ascontiguousarray(matrices[m].reshape(32, 2)).view(np.uint32)[:, 0] for m in range(4)}
    registers = words | {"%r9": BASE + LANES * 16}
    block = run(
        f"stmatrix.sync.aligned.m8n8.x4{store}.shared.b16 [%r9], {{%r0, %r1, %r2, %r3}}; bar.sync 0;"
        f"ldmatrix.sync.aligned.m8n8.x4{load}.shared.b16 {{%r4, %r5, %r6, %r7}}, [%r9];",
        registers,
    )
    for m in range(4):
        inside = matrices[m].T if store else matrices[m]
        rows = block.shared.bytes[BASE + 128 * m :][:128].view(np.uint16).reshape(8, 8)
        assert (rows == inside).all()
        expected = np.ascontiguousarray(inside.T if load else inside).reshape(32, 2).view(np.uint32)[:, 0]
        assert (block.registers[f"%r{4 + m}"] == expected).all()


@covers("shfl.sync.bfly.b32", "shfl.sync.up.b32", "shfl.sync.down.b32", "shfl.sync.idx.b32")
@pytest.mark.parametrize(
    ("mode", "distance", "clamp", "expected"),
    [
        *(("bfly", 5, 31, [lane ^ 5 for lane in range(32)]), ("idx", 7, 31, [7] * 32)),
        *(("up", 2, 0, [0, 1, *range(30)]), ("down", 3, 31, [*range(3, 32), 29, 30, 31])),
    ],
)
def test_shuffles(mode, distance, clamp, expected):
    block = run(f"shfl.sync.{mode}.b32 %r0, %r1, {distance}, {clamp}, -1;", {"%r1": LANES + 100})
    assert (block.registers["%r0"] - 100).tolist() == expected
    with pytest.raises(NotEmulated, match=f"shfl.sync.{mode}.b32"):
        run(f"shfl.sync.{mode}.b32 %r0, %r1, {distance}, {clamp}, 65535;", {"%r1": LANES})


@covers(*(f"redux.sync.{name}.{kind}" for name in ("add", "max", "min") for kind in ("s32", "u32")))
@pytest.mark.parametrize("kind", [np.int32, np.uint32])
@pytest.mark.parametrize("name", ["add", "max", "min"])
def test_reductions(name, kind):
    values = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, 64).astype(np.int32).view(kind)
    opcode = f"redux.sync.{name}.{'s' if kind is np.int32 else 'u'}32"
    block = run(f"{opcode} %r0, %r1, %r2;", {"%r1": values, "%r2": np.uint32(0xFFFFFFFF)}, threads=64)
    numbers = [values[:32].tolist(), values[32:].tolist()]
    expected = [(sum(n) if name == "add" else {"max": max, "min": min}[name](n)) % (1 << 32) for n in numbers]
    assert block.registers["%r0"].tolist() == [expected[0]] * 32 + [expected[1]] * 32
    with pytest.raises(NotEmulated, match=opcode):
        run(f"{opcode} %r0, %r1, %r2;", {"%r1": LANES, "%r2": np.uint32(1)})


@covers("elect.sync")
def test_the_first_lane_is_elected():
    block = run("elect.sync %r0|%p0, -1;", threads=64)
    assert np.flatnonzero(block.registers["%p0"]).tolist() == [0, 32]
    assert not block.registers["%r0"].any()


@covers("bra", "bra.uni", "brx.idx", "ret", "exit")
def test_threads_part_and_meet_again():
    block = run(
        "mov.u32 %r1, %tid.x; mov.b32 %r2, 0;"
        "again: add.s32 %r2, %r2, 3; sub.s32 %r1, %r1, 1; setp.gt.s32 %p1, %r1, 0; @%p1 bra again; bra.uni over;"
        "mov.b32 %r2, 99; over: mov.u32 %r3, %tid.x; and.b32 %r4, %r3, 1;"
        "table: .branchtargets even, odd; brx.idx %r4, table;"
        "even: mov.b32 %r5, 7; bra.uni end; odd: mov.b32 %r5, 8; end: setp.lt.u32 %p2, %r3, 4; @%p2 exit;"
        "mov.b32 %r5, 9;"
    )
    assert block.registers["%r2"].tolist() == [3 * max(lane, 1) for lane in range(32)]
    assert block.registers["%r5"].tolist() == [7, 8, 7, 8, *[9] * 28]


@pytest.mark.parametrize(
    "text", ["ld.global.b128 %d0, [%d1]", "st.shared.b32 [%r1]", "ld.global.nc.b32 %r0, [%d1]", "call f"]
)
def test_forms_that_are_not_modelled_are_refused_by_name(text):
    with pytest.raises(NotEmulated, match=text.split()[0]):
        run(f"{text};", {"%d1": np.uint64(0), "%r1": LANES})
