"""Generation 9's matrix instructions: a group of four warps multiplies asynchronously.

The registers of an instruction, sums and first operand, belong to it from wgmma.mma_async until wgmma.wait_group has
waited for its group. Before it, wgmma.fence must stand behind each use of them by another instruction. PTX excepts sums
that the wgmma before used too, with the same shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.emulator.machine import Block, NotEmulated, Product, Step, Value, operand, split_vector
from tests.emulator.matrix import accumulator, accumulator_words, chunks_of_matrix, first_operand, floats, multiply
from tests.emulator.memory import MemoryFault
from tests.emulator.shared_memory import NOBODY

WARPGROUP = 128


def _multiply(match: re.Match, target: str, first: str, second: str, keep: str, *signs: str) -> Step:
    columns, kind = int(match[1]), match[2]
    names, first_names = split_vector(target), split_vector(first)
    if signs != ("1", "1", "0") or len(first_names) != 4 or len(names) != columns // 2:
        raise NotEmulated(f"{match[0]} with {signs} and operands {target}, {first}")
    descriptor, kept, used = operand(second, np.uint64), operand(keep, bool), (*names, *first_names)

    def run(block: Block, active: Value) -> None:
        if not block.gather(active):
            return
        places, keeps = np.unique(descriptor(block)), np.unique(kept(block))
        if len(block.threads) % WARPGROUP or len(places) > 1 or len(keeps) > 1:
            raise NotEmulated(f"{match[0]} of warpgroups that do not multiply by one matrix")
        _check_order(block, match[0], names, first_names)
        chunks = chunks_of_matrix(int(places[0]), columns)
        bits = block.shared.read_operand(chunks, NOBODY).reshape(columns, -1).view(np.uint16)
        weights = first_operand([block.registers[name] for name in first_names], kind)
        sums = accumulator([block.registers[name] for name in names]) if keeps[0] else None
        words = accumulator_words(multiply(weights, floats(bits, kind), sums))
        # Nobody may use them until they are waited for, so it makes no difference that they are written now.
        block.registers.update(zip(names, words, strict=True))
        block.in_flight.update(dict.fromkeys(used, match[0]))
        block.products[-1].append(Product(used, chunks))

    return run


def _check_order(block: Block, opcode: str, sums: list[str], weights: list[str]) -> None:
    used = {*sums, *weights}
    if block.touched is None or block.touched & used:
        raise MemoryFault(f"{opcode}: without wgmma.fence behind what used its registers")
    missing = [name for name in used if name not in block.registers]
    if missing:
        raise MemoryFault(f"{missing[0]}: read before it was written")
    if any(block.in_flight.get(name, opcode) != opcode for name in sums):
        raise MemoryFault(f"{opcode}: adds to what a product of another shape in flight writes")
    products = [product for group in block.products for product in group]
    if any(set(p.registers[:-4]) & set(weights) or set(p.registers[-4:]) & set(sums) for p in products):
        raise MemoryFault(f"{opcode}: sums and weights of products in flight overlap")


def _fence(match: re.Match) -> Step:
    def run(block: Block, active: Value) -> None:
        if not block.gather(active):
            return
        block.touched = set()

    return run


def _commit(match: re.Match) -> Step:
    def run(block: Block, active: Value) -> None:
        if not block.gather(active):
            return
        block.products.append([])

    return run


def _wait(match: re.Match, pending: str) -> Step:
    def run(block: Block, active: Value) -> None:
        if not block.gather(active):
            return
        finished, block.products = block.products[: -1 - int(pending)], block.products[-1 - int(pending) :]
        for group in finished:
            for product in group:
                # A thread waits for its own warp; the others may still read.
                block.shared.release_operand(product.chunks, ordered=False)
        left = {name for group in block.products for product in group for name in product.registers}
        block.in_flight = {name: opcode for name, opcode in block.in_flight.items() if name in left}

    return run


WGMMA: dict[str, Callable[..., Step]] = {
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(f16|bf16)\.\2": _multiply,
    r"wgmma\.commit_group\.sync\.aligned": _commit,
    r"wgmma\.wait_group\.sync\.aligned": _wait,
    r"wgmma\.fence\.sync\.aligned": _fence,
}
