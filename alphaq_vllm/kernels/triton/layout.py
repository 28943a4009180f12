"""The order in which a GPU wants a layer's words: as the matrix instructions' registers hold the weights.

A *stripe* is 32 consecutive rows of a matrix; it keeps its bytes in memory, in another order. A *slab* is 128 columns,
or fewer if K is no multiple of 128: what the matrix product takes at a time, one group of columns or several. In row
``8 * r + t // 4`` (r < 4) of a stripe, lane t (t < 32) of a warp owns columns ``32 * c + 8 * s + 2 * (t % 4) + h`` of
each slab (c < columns / 32, s < 4, h < 2), a 16-bit register pair for every r, s and c: slot ``4 * s + r`` of chunk c.
Where both operands of a matrix instruction come from registers, Triton deals a lane four columns at a time instead of
two if they were joined from halves of words: there it owns columns
``32 * c + 16 * (s // 2) + 4 * (t % 4) + 2 * (s % 2) + h``.

The b-bit codes of a lane's 16 slots of one chunk fill b words, stored ``[slab, word, lane, chunk]``, so that a warp
loads a word of every lane and chunk as one contiguous piece, 16 bytes a lane for 128 columns. The low half of a word
is for h = 0, the high half for h = 1. Each half holds the codes of ``16 // b`` slots, in order, from the lowest bit up;
the bits that remain at the top of all the halves, in order, hold the codes of the last slots. So no bit is wasted, and
one mask takes a pair of neighbouring columns out of a word. The word is then turned left by ``7 - b`` bits, of 8-bit
codes by 3: the first slot lies where ``unpack`` wants every code, at the end of the first 7 bits of a mantissa.

Grids of a stripe are stored ``[group, t // 4, r % 2, r // 2]``: those of a lane's four rows are one int32, whose halves
have the same of two rows. Scales stay as they are.
"""

from __future__ import annotations

import dataclasses

import torch

from alphaq_vllm.kernels.experts import PackedExperts
from alphaq_vllm.kernels.triton import devices
from alphaq_vllm.packing import unpack

STRIPE = 32
SLOTS = 16
# Codes repacked at a time: their integers take four bytes each in several temporary tensors. A piece has stripes of any
# matrices of one width, for a layer has hundreds of matrices, and starting an operation takes a GPU longer than a small
# matrix of a parallel rank.
PIECE = 2**24


def repack_(experts: PackedExperts) -> PackedExperts:
    """Bring a layer's matrices from the order of the checkpoint into that of the GPU they are on, in their own memory.

    Returns the same tensors, marked as such. Raises ValueError if they have another order or N is not a multiple of 32.
    """
    if experts.order != "checkpoint":
        raise ValueError(f"experts: expected the order of the checkpoint, got that of a {experts.order}")
    if experts.N % STRIPE:
        raise ValueError(f"experts: expected a multiple of {STRIPE} rows, got {experts.N}")
    device = experts.packed.device
    quads = devices.device_of(device).quads
    columns = columns_of_a_slab(experts.K)
    stripes_per_piece = max(1, PIECE // (STRIPE * experts.K))
    for num_bits in experts.widths:
        words_per_stripe = experts.K * num_bits
        within = torch.arange(words_per_stripe, device=device)
        matrices = experts.offsets[experts.num_bits == num_bits]
        stripes = matrices[:, None] + words_per_stripe * torch.arange(experts.N // STRIPE, device=device)
        for piece in stripes.flatten().split(stripes_per_piece):
            words = piece[:, None] + within
            codes = unpack(experts.packed[words].view(-1, words_per_stripe // STRIPE), num_bits)
            experts.packed[words] = _tile_codes(codes, num_bits, columns, quads).view_as(words)
    for piece in experts.grids.view(-1, STRIPE, experts.grids.shape[-1]).split(stripes_per_piece):
        piece.copy_(piece.unflatten(1, (2, 2, 8)).permute(0, 4, 3, 2, 1).reshape_as(piece))
    return dataclasses.replace(experts, order="gpu")


def columns_of_a_slab(K: int) -> int:
    """Of K columns, how many the matrix product takes at a time: one group of them or several.

    >>> columns_of_a_slab(2048), columns_of_a_slab(704)
    (128, 64)
    """
    return next(columns for columns in (128, 64, 32) if K % columns == 0)


def _tile_codes(codes: torch.Tensor, num_bits: int, columns: int, quads: bool) -> torch.Tensor:
    """The words of some stripes: ``codes [N, K]`` uint8 to ``[N * K * num_bits / 32]`` int32."""
    fragments = codes.to(torch.int32).view(-1, 4, 8, codes.shape[1] // columns, columns // 32, 2, 2, 4, 2)
    # stripe, r, t // 4, slab, c, s // 2, s % 2, t % 4, h
    if quads:
        fragments = fragments.view(*fragments.shape[:-3], 4, 2, 2).transpose(-3, -2)
    # stripe, slab, t // 4, t % 4, c, (s, r), h
    slots = fragments.permute(0, 3, 2, 7, 4, 5, 6, 1, 8).flatten(-4, -2)
    per_word = SLOTS // num_bits
    halves = torch.tensor([0, 16], dtype=torch.int32, device=codes.device)
    first = torch.arange(per_word, dtype=torch.int32, device=codes.device)[:, None] * num_bits
    whole = slots[..., : per_word * num_bits, :].unflatten(-2, (num_bits, per_word)) << (first + halves)
    words = whole.sum((-2, -1), dtype=torch.int32)
    spare = 16 - per_word * num_bits
    if spare:
        bit = torch.arange(num_bits, dtype=torch.int32, device=codes.device)[:, None]
        bits = ((slots[..., per_word * num_bits :, None, :] >> bit) & 1).flatten(-3, -2)
        place = per_word * num_bits + torch.arange(spare, dtype=torch.int32, device=codes.device)[:, None]
        words += (bits.unflatten(-2, (num_bits, spare)) << (place + halves)).sum((-2, -1), dtype=torch.int32)
    turn = 7 - (4 if num_bits == 8 else num_bits)
    words = words << turn | words >> (32 - turn) & ((1 << turn) - 1)
    # stripe, slab, t // 4, t % 4, c, word  ->  stripe, slab, word, lane, c
    return words.flatten(2, 3).permute(0, 1, 4, 2, 3).flatten()
