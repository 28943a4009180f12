"""Generation 10's matrix instructions, whose first operand and sum are in tensor memory.

Warp w reaches lanes 32 * (w % 4) and on. A product of 64 rows uses 16 lanes of each four warps', one of 128 all.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.emulator.machine import TENSOR_LOAD, Block, NotEmulated, Step, Value, address_of, operand, split_vector
from tests.emulator.matrix import chunks_of_matrix, floats, multiply
from tests.emulator.memory import WARP, MemoryFault
from tests.emulator.tensor_memory import TensorProduct


def _allocate(match: re.Match, target: str, columns: str) -> Step:
    address, count = address_of(target, np.uint32), int(columns)
    if count not in (32, 64, 128, 256, 512):
        raise NotEmulated(f"tcgen05.alloc of {count} columns")

    def run(block: Block, active: Value) -> None:
        first = _one_warp(block, active, match[0])
        block.tensor_memory.allocate(count)
        block.shared.store(address(block)[first], np.zeros((1, 4), np.uint8), first)

    return run


def _one_warp(block: Block, active: Value, name: str) -> Value:
    """The first thread of the one warp that does this."""
    block.whole_warps(active, name)
    if active.sum() != WARP:
        raise NotEmulated(f"{name} by several warps")
    return block.threads[active][:1]


def _one_thread(block: Block, active: Value, name: str) -> int:
    if active.sum() != 1:
        raise NotEmulated(f"{name} by several threads")
    return int(np.flatnonzero(active)[0])


def _deallocate(match: re.Match, address: str, columns: str) -> Step:
    read, count = operand(address, np.uint32), int(columns)

    def run(block: Block, active: Value) -> None:
        first = _one_warp(block, active, match[0])
        if read(block)[first][0]:
            raise MemoryFault("tensor memory: tcgen05.dealloc of what was not allocated")
        block.tensor_memory.deallocate(count, int(first[0]) // WARP)

    return run


def _relinquish(match: re.Match) -> Step:
    def run(block: Block, active: Value) -> None:
        _one_warp(block, active, match[0])
        block.tensor_memory.may_allocate = False

    return run


def _places(block: Block, addresses: Value, active: Value, shape: str, count: int, split: int) -> tuple[Value, Value]:
    """Lanes and columns ``[threads, count]`` of what each active thread's registers are for."""
    base = addresses[active].astype(np.int64)[:, None]
    warp, thread, register = (
        block.threads[active][:, None] // WARP,
        block.threads[active][:, None] % WARP,
        np.arange(count),
    )
    if shape == "16x128b":
        # As the first operand of mma holds 16 rows of 8 16-bit numbers, repeated along the columns.
        lane, column = thread // 4 + register % 2 * 8, thread % 4 + register // 2 * 4
    elif shape == "32x32b":
        lane, column = thread + 0 * register, 0 * thread + register
    else:
        # 16x32bx2: 16 threads have a lane each, the other 16 the same lanes some columns further on.
        lane, column = thread % 16 + 0 * register, thread // 16 * split + register
    lane = lane + (base >> 16)
    if (lane // 32 != warp % 4).any():
        raise MemoryFault("tensor memory: a lane of another warp's")
    return lane, column + (base & 0xFFFF)


def _store(match: re.Match, target: str, *split_and_source: str) -> Step:
    *split, source = split_and_source
    names, address = _registers(match, source), address_of(target, np.uint32)

    def run(block: Block, active: Value) -> None:
        block.whole_warps(active, match[0])
        values = np.stack([block.read(name, np.uint32)[active] for name in names], 1)
        places = _places(block, address(block), active, match[1], len(names), int(split[0]) if split else 0)
        block.tensor_memory.store(places, values, block.threads[active][:, None] // WARP)

    return run


def _load(match: re.Match, target: str, source: str, split: str = "0") -> Step:
    names, address = _registers(match, target), address_of(source, np.uint32)

    def run(block: Block, active: Value) -> None:
        block.whole_warps(active, match[0])
        values = np.zeros((len(active), len(names)), np.uint32)
        places = _places(block, address(block), active, match[1], len(names), int(split))
        values[active] = block.tensor_memory.load(places, block.threads[active][:, None] // WARP)
        for i, name in enumerate(names):
            block.write(name, np.ascontiguousarray(values[:, i]), active)
        block.in_flight.update(dict.fromkeys(names, TENSOR_LOAD))

    return run


def _registers(match: re.Match, text: str) -> list[str]:
    """How many there must be: a lane's 32 bits for each repetition, or its 128 of 16 rows' 16 bytes."""
    names = split_vector(text)
    if len(names) != int(match[2]) * (2 if match[1] == "16x128b" else 1):
        raise NotEmulated(f"{match[0]} of {len(names)} registers")
    return names


def _wait_stores(match: re.Match) -> Step:
    def run(block: Block, active: Value) -> None:
        if not block.gather(active):
            return
        block.tensor_memory.wait_stores()

    return run


def _wait_loads(match: re.Match) -> Step:
    def run(block: Block, active: Value) -> None:
        if not block.gather(active):
            return
        block.tensor_memory.wait_loads()
        block.in_flight.clear()

    return run


def _rows_from(place: int, rows: int, columns: int) -> tuple[Value, Value]:
    """Lanes and columns of 128 rows, or of 64; these in the first 16 lanes of each warp's, or in the others."""
    lanes = (place >> 16) + (np.arange(4)[:, None] * 32 + np.arange(rows // 4)).reshape(-1, 1)
    if place >> 16 not in range(0, 32, rows // 4):
        raise NotEmulated(f"tcgen05.mma of {rows} rows in lanes from {place >> 16} on")
    return lanes, (place & 0xFFFF) + np.arange(columns)


def _multiply(match: re.Match, target: str, first: str, second: str, form: str, keep: str) -> Step:
    to, weights = address_of(target, np.uint32), address_of(first, np.uint32)
    descriptor, form_of, kept = operand(second, np.uint64), operand(form, np.uint32), operand(keep, bool)

    def run(block: Block, active: Value) -> None:
        thread, memory = _one_thread(block, active, match[0]), block.tensor_memory
        to_place, weight_place = int(to(block)[thread]), int(weights(block)[thread])
        place, add, bits = int(descriptor(block)[thread]), bool(kept(block)[thread]), int(form_of(block)[thread])
        # Instruction descriptor: float32 sums, 16-bit operands of one type, 64 or 128 rows, columns in eights.
        kind, rows, columns = ("f16", "bf16")[bits >> 7 & 1], (bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8
        others = bits & ~(0x10 | 0x480 | 0x1F << 24 | 0x3F << 17)
        if not bits & 0x10 or others or (bits >> 7 & 7) != (bits >> 10 & 7) or rows not in (64, 128):
            raise NotEmulated(f"{match[0]} of the form {bits:#x}")
        at, weights_at = _rows_from(to_place, rows, columns), _rows_from(weight_place, rows, 8)
        at, weights_at = np.broadcast_arrays(*at), np.broadcast_arrays(*weights_at)
        chunks = chunks_of_matrix(place & ~(7 << 46), columns)
        if place >> 46 & 7 != 1:
            raise NotEmulated(f"{match[0]} by a descriptor without the version of generation 10")
        product = TensorProduct(tuple(weights_at), tuple(at), chunks, bits)
        memory.begin(product, thread // WARP, add=add)
        matrix = floats(np.ascontiguousarray(memory.words[product.weights]).view(np.uint16), kind)
        values = floats(block.shared.read_operand(chunks, thread).reshape(columns, -1).view(np.uint16), kind)
        sums = memory.words[product.sums].view(np.float32) if add else None
        # Nobody may use them until they are waited for, so it makes no difference that they are written now.
        memory.words[product.sums] = multiply(matrix, values, sums).view(np.uint32)

    return run


def _commit(match: re.Match, barrier: str) -> Step:
    address = address_of(barrier, np.uint32)

    def run(block: Block, active: Value) -> None:
        thread = _one_thread(block, active, match[0])
        place = int(address(block)[thread])
        block.shared.use_barrier(place, np.array([thread]))
        block.tensor_memory.commit(place)

    return run


def _initialize(match: re.Match, barrier: str, count: str) -> Step:
    address = address_of(barrier, np.uint32)
    if count != "1":
        raise NotEmulated("mbarrier of several arrivals")

    def run(block: Block, active: Value) -> None:
        thread = _one_thread(block, active, match[0])
        place = int(address(block)[thread])
        block.shared.initialize_barrier(place, thread)
        block.tensor_memory.phases[place] = 0

    return run


def _invalidate(match: re.Match, barrier: str) -> Step:
    address = address_of(barrier, np.uint32)

    def run(block: Block, active: Value) -> None:
        thread = _one_thread(block, active, match[0])
        place = int(address(block)[thread])
        block.shared.invalidate_barrier(place, thread)
        del block.tensor_memory.phases[place]

    return run


def _try_wait(match: re.Match, target: str, barrier: str, parity: str) -> Step:
    address, read_parity = address_of(barrier, np.uint32), operand(parity, np.uint32)

    def run(block: Block, active: Value) -> None:
        if not block.gather(active):
            return
        places, phases = np.unique(address(block)), np.unique(read_parity(block))
        if len(places) > 1 or len(phases) > 1:
            raise NotEmulated(f"{match[0]} of threads for different phases")
        block.shared.use_barrier(int(places[0]), block.threads)
        block.tensor_memory.wait(int(places[0]), int(phases[0]), block.shared)
        block.write(target, np.ones(len(active), bool), active)

    return run


TCGEN05: dict[str, Callable[..., Step]] = {
    r"tcgen05\.alloc\.cta_group::1\.sync\.aligned\.shared::cta\.b32": _allocate,
    r"tcgen05\.st\.sync\.aligned\.(16x128b|16x32bx2|32x32b)\.x(\d+)\.b32": _store,
    r"tcgen05\.ld\.sync\.aligned\.(16x128b|16x32bx2|32x32b)\.x(\d+)\.b32": _load,
    r"tcgen05\.mma\.cta_group::1\.kind::f16": _multiply,
    r"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one(?:\.shared::cluster)?\.b64": _commit,
    r"mbarrier\.init\.shared(?:::cta)?\.b64": _initialize,
    r"mbarrier\.inval\.shared(?:::cta)?\.b64": _invalidate,
    r"mbarrier\.try_wait\.parity\.shared(?:::cta)?\.b64": _try_wait,
    r"tcgen05\.dealloc\.cta_group::1\.sync\.aligned\.b32": _deallocate,
    r"tcgen05\.relinquish_alloc_permit\.cta_group::1\.sync\.aligned": _relinquish,
    r"tcgen05\.wait::st\.sync\.aligned": _wait_stores,
    r"tcgen05\.wait::ld\.sync\.aligned": _wait_loads,
}
