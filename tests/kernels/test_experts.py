from __future__ import annotations

import pytest
import torch

from alphaq_vllm import packing
from alphaq_vllm.kernels import PackedExperts, expert_offsets

BITS = [[1, 8], [3, 2], [7, 5]]


def stored(num_bits: int, out_features: int = 32, in_features: int = 96, group_size: int = 32):
    generator = torch.Generator().manual_seed(num_bits)
    codes = torch.randint(0, 2**num_bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    scale = torch.rand(out_features, 1, generator=generator).bfloat16()
    grid = torch.randint(0, 256, (out_features, in_features // group_size), generator=generator, dtype=torch.uint8)
    return packing.pack(codes, num_bits), scale, grid, num_bits


def test_matrix_dequantizes_each_matrix_from_its_place():
    experts = PackedExperts.from_matrices([[stored(b) for b in projections] for projections in BITS])
    for e, projections in enumerate(BITS):
        for p, bits in enumerate(projections):
            expected = packing.dequantize(*stored(bits))
            assert torch.equal(experts.matrix(e, p), expected)
            assert torch.equal(experts.matrix(e, p, slice(3, 7), torch.bfloat16), expected[3:7].bfloat16())


def test_from_matrices_holds_the_stored_bytes_and_no_more():
    experts = PackedExperts.from_matrices([[stored(b) for b in projections] for projections in BITS])
    assert (experts.num_experts, experts.num_projections, experts.N, experts.K) == (3, 2, 32, 96)
    assert (experts.group_size, experts.widths) == (32, (1, 2, 3, 5, 7, 8))
    assert experts.packed.numel() == sum(stored(b)[0].numel() for projections in BITS for b in projections)
    assert experts.num_bits.tolist() == BITS
    assert [t.dtype for t in experts.tensors] == [
        torch.int32,
        torch.bfloat16,
        torch.uint8,
        torch.int32,
        torch.int64,
    ]


def test_from_matrices_refuses_an_unknown_group_size():
    with pytest.raises(ValueError, match=r"group_size: expected one of \(32, 64, 128\), got 48"):
        PackedExperts.from_matrices([[stored(2, group_size=48)]])


def test_expert_offsets_follow_one_another_on_16_byte_boundaries():
    offsets, total = expert_offsets(BITS, 4, 32)
    sizes = [4 * b for projections in BITS for b in projections]
    flat = [offset for projections in offsets for offset in projections]
    assert flat == [sum(sizes[:i]) for i in range(len(sizes))]
    assert total == sum(sizes)
    assert all(offset % 4 == 0 for offset in flat)


@pytest.mark.parametrize(("N", "K"), [(64, 48), (2, 32)])
def test_expert_offsets_refuse_sizes_that_would_not_align(N, K):
    with pytest.raises(ValueError, match="expected K a multiple of 32 and N"):
        expert_offsets([[3]], N, K)
