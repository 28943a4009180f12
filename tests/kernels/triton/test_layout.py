from __future__ import annotations

import dataclasses
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alphaq_vllm.kernels import PackedExperts, repack_
from alphaq_vllm.kernels.triton import devices
from alphaq_vllm.packing import unpack

ALL_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)


def tiled_code(words: list[int], row: int, column: int, K: int, num_bits: int, columns: int, quads: bool) -> int:
    """One code, found as the layout's description says, bit by bit."""
    stripe, slab, chunks = row // 32, column // columns, columns // 32
    chunk = column % columns // 32
    if quads:
        lane, s = row % 8 * 4 + column % 16 // 4, column % 32 // 16 * 2 + column % 4 // 2
    else:
        lane, s = row % 8 * 4 + column % 8 // 2, column % 32 // 8
    slot = s * 4 + row % 32 // 8
    per_word = 16 // num_bits
    first_word = (stripe * (K // columns) + slab) * num_bits * 32 * chunks

    turn = 3 if num_bits == 8 else 7 - num_bits

    def bit(word: int, position: int) -> int:
        place = first_word + (word * 32 + lane) * chunks + chunk
        return words[place] >> (position + 16 * (column % 2) + turn) % 32 & 1

    code = 0
    for i in range(num_bits):
        if slot < per_word * num_bits:
            word, position = slot // per_word, slot % per_word * num_bits + i
        else:
            spare = 16 - per_word * num_bits
            stream = (slot - per_word * num_bits) * num_bits + i
            word, position = stream // spare, per_word * num_bits + stream % spare
        code |= bit(word, position) << i
    return code


@pytest.mark.parametrize("generation", [8, 9])
@pytest.mark.parametrize(("K", "group_size"), [(96, 32), (192, 64), (256, 32), (256, 64), (256, 128)])
@pytest.mark.parametrize("num_bits", ALL_WIDTHS)
def test_repack_puts_every_code_where_the_layout_says(num_bits, K, group_size, generation, make_experts, monkeypatch):
    monkeypatch.setattr(devices, "device_of", lambda _: devices.Device(4, generation))
    torch.manual_seed(0)
    N, columns, groups = 64, 128 if K == 256 else group_size, K // group_size
    experts = make_experts([[num_bits]], N, K, group_size)
    codes = unpack(experts.packed.view(N, -1), num_bits)
    scales, grids = experts.scales.clone(), experts.grids[0, 0].clone()
    tiled = repack_(experts)
    words = [word & 0xFFFFFFFF for word in tiled.packed.tolist()]
    for row, column in product(range(0, N, 3), range(0, K, 5)):
        assert tiled_code(words, row, column, K, num_bits, columns, generation == 8) == codes[row, column]
    for row, group in product(range(N), range(groups)):
        r = row % 32 // 8
        place = (row // 32 * groups + group) * 32 + row % 8 * 4 + r % 2 * 2 + r // 2
        assert tiled.grids.flatten()[place] == grids[row, group]
    assert torch.equal(tiled.scales, scales)


def test_repack_moves_bits_within_each_stripe_of_each_matrix(make_experts):
    """The number of ones of every stripe stays, for every matrix has memory of its own that no other disturbs."""
    torch.manual_seed(0)
    experts = make_experts([[1, 8], [3, 5], [7, 2]], 96, 64, 32)
    before = experts.packed.clone()
    tiled = repack_(experts)
    assert not torch.equal(tiled.packed, before)
    for bits, offset in zip(experts.num_bits.flatten().tolist(), experts.offsets.flatten().tolist(), strict=True):
        for start in range(offset, offset + 96 * 64 * bits // 32, 64 * bits):
            stripes = (words[start : start + 64 * bits].tolist() for words in (before, tiled.packed))
            old, new = (sum((word & 0xFFFFFFFF).bit_count() for word in stripe) for stripe in stripes)
            assert old == new


def test_repack_stays_in_place_and_repeats_after_loading_again(make_experts):
    torch.manual_seed(0)
    experts = make_experts([[3, 4], [2, 3]], 64, 128, 128)
    tensors = (experts.packed, experts.scales, experts.grids)
    stored = [tensor.clone() for tensor in tensors]
    tiled = repack_(experts)
    assert tiled.order == "gpu"
    assert [tensor.data_ptr() for tensor in tiled.tensors[:3]] == [tensor.data_ptr() for tensor in tensors]
    first = [tensor.clone() for tensor in tensors]
    for tensor, values in zip(tensors, stored, strict=True):
        tensor.copy_(values)
    repack_(experts)
    assert all(torch.equal(*pair) for pair in zip(tensors, first, strict=True))


def test_repack_does_large_matrices_in_pieces(make_experts, monkeypatch):
    torch.manual_seed(0)
    experts = make_experts([[3]], 160, 64, 32)
    whole = repack_(dataclasses.replace(experts, packed=experts.packed.clone(), grids=experts.grids.clone()))
    monkeypatch.setattr("alphaq_vllm.kernels.triton.layout.PIECE", 1)
    pieces = repack_(experts)
    assert torch.equal(pieces.packed, whole.packed)
    assert torch.equal(pieces.grids, whole.grids)


class Operations(TorchDispatchMode):
    """Counts what would be started on a GPU."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def test_repack_starts_no_more_operations_for_more_matrices(make_experts):
    """A layer of DeepSeek-V3 has 768: one at a time they are minutes of a server's start."""
    numbers = []
    for num_experts in (2, 64):
        experts = make_experts([[2, 3]] * num_experts, 64, 64, 32)
        with Operations() as operations:
            repack_(experts)
        numbers.append(operations.number)
    assert numbers[0] == numbers[1]


def test_repack_knows_widths_that_no_matrix_has(make_experts):
    experts = make_experts([[3]], 64, 64, 32)
    known = dataclasses.replace(
        experts, widths=(2, 3, 5), **{n: getattr(experts, n).clone() for n in ("packed", "grids")}
    )
    assert torch.equal(repack_(known).packed, repack_(experts).packed)


def test_repack_refuses_what_it_cannot_tile(make_experts):
    tiled = repack_(make_experts([[4]], 32, 32, 32))
    with pytest.raises(ValueError, match="expected the order of the checkpoint, got that of a gpu"):
        repack_(tiled)
    with pytest.raises(ValueError, match="expected a multiple of 32 rows, got 48"):
        repack_(make_experts([[4]], 48, 32, 32))
    assert isinstance(tiled, PackedExperts)
