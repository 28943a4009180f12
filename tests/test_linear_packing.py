import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from alphaq_vllm.linear_packing import dequantize, pack, unpack


@given(st.sampled_from([4, 8]), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**31))
def test_unpack_inverts_pack(num_bits, rows, units, seed):
    half = 2 ** (num_bits - 1)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-half, half, (rows, 32 * units), generator=generator, dtype=torch.int8)
    packed = pack(codes, num_bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, units * num_bits)
    assert torch.equal(unpack(packed, num_bits), codes)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_pack_has_the_order_of_compressed_tensors(num_bits):
    half = 2 ** (num_bits - 1)
    codes = torch.randint(-half, half, (5, 96), dtype=torch.int8)
    assert torch.equal(unpack_from_int32(pack(codes, num_bits), num_bits, codes.shape), codes)


def test_pack_golden_words():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2)
    assert [word & 0xFFFFFFFF for word in pack(codes, 4).tolist()] == [0x76543210, 0xFEDCBA98] * 2
    assert [word & 0xFFFFFFFF for word in pack(codes, 8).tolist()][:2] == [0x7B7A7978, 0x7F7E7D7C]


@pytest.mark.parametrize(
    ("codes", "num_bits", "message"),
    [
        (torch.full((1, 32), 8, dtype=torch.int8), 4, "codes: expected -8 to 7, got 8 to 8"),
        (torch.full((1, 32), -9, dtype=torch.int8), 4, "codes: expected -8 to 7, got -9 to -9"),
        (torch.zeros((1, 40), dtype=torch.int8), 4, "in_features: expected a multiple of 32, got 40"),
        (torch.zeros((1, 32), dtype=torch.int8), 3, "num_bits: expected one of"),
    ],
)
def test_pack_refuses(codes, num_bits, message):
    with pytest.raises(ValueError, match=message):
        pack(codes, num_bits)


def test_dequantize_multiplies_each_group_with_its_scale():
    codes = torch.randint(-8, 8, (3, 128), dtype=torch.int8)
    scale = torch.randn(3, 4).bfloat16()
    expected = codes.float() * scale.float().repeat_interleave(32, 1)
    assert torch.equal(dequantize(pack(codes, 4), scale, 4), expected)
    assert torch.equal(dequantize(pack(codes, 4), scale, 4, torch.bfloat16), expected.bfloat16())
