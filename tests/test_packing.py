import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaq_vllm.packing import dequantize, pack, planes, unpack


@given(num_bits=st.integers(1, 8), rows=st.integers(0, 3), units=st.integers(1, 5), seed=st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_unpack_inverts_pack(num_bits, rows, units, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**num_bits, (rows, 32 * units), dtype=torch.uint8, generator=generator)
    packed = pack(codes, num_bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, units * num_bits)
    assert torch.equal(unpack(packed, num_bits), codes)


@given(num_bits=st.integers(1, 8), start=st.integers(0, 3), stop=st.integers(4, 8), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_pack_slices_of_whole_units_are_slices_of_words(num_bits, start, stop, seed):
    """What tensor parallelism relies on."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**num_bits, (2, 256), dtype=torch.uint8, generator=generator)
    part = pack(codes, num_bits)[:, start * num_bits : stop * num_bits]
    assert torch.equal(unpack(part, num_bits), codes[:, 32 * start : 32 * stop])


@pytest.mark.parametrize(
    ("num_bits", "code", "position", "words"),
    [
        (1, 1, 0, [1]),
        (1, 1, 1, [1 << 16]),  # odd codes in the high half
        (1, 1, 31, [-(2**31)]),
        (2, 3, 2, [0b1100, 0]),
        (2, 3, 16, [0, 0b11]),  # the second half of the codes in the second word
        (3, 0b101, 0, [0b01, 0, 0b1]),  # the low bits in the 2-bit plane, the high bit in the 1-bit plane
        (4, 0xF, 9, [0, 0xF << 16, 0, 0]),
        (7, 0b1_10_0101, 0, [0b0101, 0, 0, 0, 0b10, 0, 0b1]),
        (8, 0xAB, 3, [0xAB << 24, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_pack_golden_words(num_bits, code, position, words):
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, position] = code
    expected = [w - 2**32 if w >= 2**31 else w for w in words]
    assert pack(codes, num_bits).tolist() == [expected]


def test_pack_golden_row():
    codes = (torch.arange(32, dtype=torch.uint8) % 8)[None]
    assert [hex(w & 0xFFFFFFFF) for w in pack(codes, 3)[0].tolist()] == ["0xdddd8888", "0xdddd8888", "0xcccccccc"]


def test_pack_refuses_codes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"below 2\*\*3, got 8"):
        pack(torch.full((1, 32), 8, dtype=torch.uint8), 3)


def test_pack_refuses_part_of_a_unit():
    with pytest.raises(ValueError, match="multiple of 32, got 31"):
        pack(torch.zeros(1, 31, dtype=torch.uint8), 3)


@pytest.mark.parametrize("num_bits", [0, 9, -1])
def test_planes_refuses_other_widths(num_bits):
    with pytest.raises(ValueError, match="num_bits"):
        planes(num_bits)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_dequantize_applies_each_group_to_its_columns(group_size):
    codes = torch.randint(0, 8, (3, 128), dtype=torch.uint8)
    groups = 128 // group_size
    scale = torch.rand(3, 1).bfloat16()
    grid = torch.randint(0, 256, (3, groups), dtype=torch.uint8)
    weight = dequantize(pack(codes, 3), scale, grid, 3)
    for column in range(128):
        byte = grid[:, column // group_size].double()
        step, zero_point = byte % 16 + 1, ((byte / 16).floor() + 6) / 4
        expected = scale[:, 0].double() * step * (codes[:, column].double() - zero_point)
        assert torch.equal(weight[:, column].double(), expected)


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_0_is_a_value_of_a_grid_with_its_zero_point_in_the_middle(num_bits):
    codes = torch.full((1, 32), 2 ** (num_bits - 1), dtype=torch.uint8)
    grid = torch.tensor([[0xA0]], dtype=torch.uint8)
    assert not dequantize(pack(codes, num_bits), torch.ones(1, 1), grid, num_bits).any()
