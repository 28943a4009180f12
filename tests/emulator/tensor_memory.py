"""Generation 10's matrix instructions, whose first operand and sum are in tensor memory: 128 lanes of 512 words.

Warp w reaches lanes 32 * (w % 4) and on. A product of 64 rows uses 16 lanes of each four warps', one of 128 all.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.emulator.machine import Block, NotEmulated, Product, Step, Value, address_of, operand, split_vector
from tests.emulator.matrix import floats, matrix_in_shared_memory
from tests.emulator.memory import WARP, MemoryFault


def _allocate(match: re.Match, target: str, columns: str) -> Step:
    address = address_of(target, np.uint32)

    def run(block: Block, active: Value) -> None:
        first = block.threads[active][:1]
        block.shared.store(address(block)[first], np.zeros((1, 4), np.uint8), first)

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
    names, address = split_vector(source), address_of(target, np.uint32)

    def run(block: Block, active: Value) -> None:
        values = np.stack([block.read(name, np.uint32)[active] for name in names], 1)
        places = _places(block, address(block), active, match[1], len(names), int(split[0]) if split else 0)
        block.tensor_memory[places] = values

    return run


def _load(match: re.Match, target: str, source: str, split: str = "0") -> Step:
    names, address = split_vector(target), address_of(source, np.uint32)

    def run(block: Block, active: Value) -> None:
        values = np.zeros((len(active), len(names)), np.uint32)
        places = _places(block, address(block), active, match[1], len(names), int(split))
        values[active] = block.tensor_memory[places]
        for i, name in enumerate(names):
            block.write(name, np.ascontiguousarray(values[:, i]), active)

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
        thread = int(np.flatnonzero(active)[0])
        to_place, weight_place = int(to(block)[thread]), int(weights(block)[thread])
        place, add, bits = int(descriptor(block)[thread]), bool(kept(block)[thread]), int(form_of(block)[thread])
        # Instruction descriptor: float32 sums, 16-bit operands of one type, 64 or 128 rows, columns in eights.
        kind, rows, columns = ("f16", "bf16")[bits >> 7 & 1], (bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8
        if (bits >> 4 & 3) != 1 or (bits >> 7 & 7) != (bits >> 10 & 7) or rows not in (64, 128) or bits >> 13 & 15:
            raise NotEmulated(f"tcgen05.mma of the form {bits:#x}")

        def compute(block: Block) -> None:
            words = block.tensor_memory[_rows_from(weight_place, rows, 8)]
            matrix = floats(np.ascontiguousarray(words).view(np.uint16), kind)
            result = matrix @ floats(matrix_in_shared_memory(block, place, columns), kind).T
            at = _rows_from(to_place, rows, columns)
            if add:
                result = result + block.tensor_memory[at].view(np.float32)
            block.tensor_memory[at] = result.astype(np.float32).view(np.uint32)

        block.products[-1].append(Product(compute))

    return run


def _commit(match: re.Match, barrier: str) -> Step:
    address = address_of(barrier, np.uint32)

    def run(block: Block, active: Value) -> None:
        place = int(address(block)[active][0])

        def arrive(block: Block) -> None:
            block.barriers[place] ^= 1

        block.products[-1].append(Product(arrive))
        block.products.append([])

    return run


def _initialize(match: re.Match, barrier: str, count: str) -> Step:
    address = address_of(barrier, np.uint32)
    if count != "1":
        raise NotEmulated("mbarrier of several arrivals")

    def run(block: Block, active: Value) -> None:
        block.barriers[int(address(block)[active][0])] = 0

    return run


def _invalidate(match: re.Match, barrier: str) -> Step:
    address = address_of(barrier, np.uint32)
    return lambda block, active: block.barriers.pop(int(address(block)[active][0])) and None


def _try_wait(match: re.Match, target: str, barrier: str, parity: str) -> Step:
    address, read_parity = address_of(barrier, np.uint32), operand(parity, np.uint32)

    def run(block: Block, active: Value) -> None:
        place, phase = int(address(block)[active][0]), int(read_parity(block)[active][0])
        if block.barriers[place] == phase:
            # As late as can be, so that operands that were overwritten too early show.
            block.wait_products(0)
        if block.barriers[place] == phase:
            raise MemoryFault("mbarrier: a wait that nothing ends")
        block.write(target, np.ones(len(active), bool), active)

    return run


def _nothing(match: re.Match, *_: str) -> Step:
    return lambda block, active: None


TENSOR_MEMORY: dict[str, Callable[..., Step]] = {
    r"tcgen05\.alloc\.cta_group::1\.sync\.aligned\.shared::cta\.b32": _allocate,
    r"tcgen05\.st\.sync\.aligned\.(16x128b|16x32bx2|32x32b)\.x\d+\.b32": _store,
    r"tcgen05\.ld\.sync\.aligned\.(16x128b|16x32bx2|32x32b)\.x\d+\.b32": _load,
    r"tcgen05\.mma\.cta_group::1\.kind::f16": _multiply,
    r"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one(?:\.shared::cluster)?\.b64": _commit,
    r"mbarrier\.init\.shared(?:::cta)?\.b64": _initialize,
    r"mbarrier\.inval\.shared(?:::cta)?\.b64": _invalidate,
    r"mbarrier\.try_wait\.parity\.shared(?:::cta)?\.b64": _try_wait,
    r"tcgen05\.(?:wait::(?:ld|st)|relinquish_alloc_permit|dealloc).*": _nothing,
}
