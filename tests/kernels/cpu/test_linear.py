"""Linear layers on the native CPU kernel, as every instruction set that this processor has."""

from __future__ import annotations

import pytest
import torch

from alphaq_vllm import linear_packing
from alphaq_vllm import native_build as build
from alphaq_vllm.kernels.cpu import native
from alphaq_vllm.kernels.linear import PackedLinear, linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def stored(num_bits: int, rows: int, columns: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed words and scales."""
    half = 2 ** (num_bits - 1)
    codes = torch.randint(-half, half, (rows, columns), dtype=torch.int8)
    scales = (torch.rand(rows, columns // group_size) + 0.5) / half / columns**0.5
    return linear_packing.pack(codes, num_bits), scales.bfloat16()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("instruction_set", build.supported())
def test_multiplies_with_the_dequantized_weights(instruction_set, num_bits, group_size, dtype, assert_close):
    torch.manual_seed(0)
    packed, scales = stored(num_bits, 48, 384, group_size)
    weight = linear_packing.dequantize(packed, scales, num_bits).double()
    native.repack_linear_(packed, scales, num_bits, instruction_set)
    for num_tokens in (0, 1, 2, 3, 17, 150):
        x = torch.randn(num_tokens, 384).to(dtype)
        out = native.linear(x, packed, scales, num_bits, instruction_set)
        assert_close(out, x.double() @ weight.T, dtype)


def test_operator_takes_any_leading_dimensions(assert_close):
    packed, scales = stored(4, 32, 64, 32)
    weight = linear_packing.dequantize(packed, scales, 4).double()
    weights = PackedLinear(packed, scales, 4)
    weights.prepare_()
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    out = linear(x, weights)
    assert_close(out, x.double() @ weight.T, torch.bfloat16)
    assert torch.equal(linear(x.flip(0), weights).flip(0), out)
    assert linear(x[:0], weights).shape == (0, 3, 32)
    torch.library.opcheck(torch.ops.alphaq.linear.default, (x, packed, scales, 4))


def test_refuses_what_it_cannot_compute():
    weights = PackedLinear(*stored(4, 32, 64, 32), 4)
    with pytest.raises(TypeError, match=r"x: expected one of .*, got torch.float64"):
        linear(torch.zeros(1, 64, dtype=torch.float64), weights)
    with pytest.raises(ValueError, match="x: expected 64 columns, got 63"):
        linear(torch.zeros(1, 63), weights)
    with pytest.raises(ValueError, match="packed: expected a multiple of 16 rows, got 40"):
        PackedLinear(*stored(4, 40, 64, 32), 4).prepare_()
