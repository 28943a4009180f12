import pytest
import torch

from alphaq_vllm.linear_packing import dequantize, unpack
from offline.quantizers.symmetric import quantize_symmetric


def restored(weight, num_bits, group_size):
    quantized = quantize_symmetric(weight, num_bits, group_size)
    return dequantize(quantized.packed, quantized.scale, num_bits)


def best_mse(weight, num_bits, group_size):
    """By trying 2,000 scales of either sign for each group."""
    half = 2 ** (num_bits - 1)
    groups = weight.float().reshape(-1, group_size)
    largest = groups.abs().amax(1, keepdim=True)
    least = torch.full_like(largest, torch.inf)
    for factor in torch.linspace(0.4, 1.2, 1000):
        for sign in (-1, 1):
            scale = (sign * factor * largest / half).bfloat16().float()
            codes = (groups / scale).round().clamp(-half, half - 1)
            least = torch.minimum(least, (groups - scale * codes).square().mean(1, keepdim=True))
    return least.mean().item()


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("shape", ["normal", "heavy", "shifted"])
def test_quantize_symmetric_is_as_good_as_a_search_of_all_scales(num_bits, group_size, shape):
    torch.manual_seed(0)
    weight = {
        "normal": torch.randn(24, 256),
        "heavy": torch.distributions.StudentT(3.0).sample((24, 256)),
        "shifted": torch.randn(24, 256) + 2,
    }[shape]
    mse = quantize_symmetric(weight, num_bits, group_size).mse
    # Scales have no more digits than 8-bit codes, so among many some happen to round well.
    tolerance = {4: 1.01, 8: 1.2}[num_bits]
    assert mse <= tolerance * best_mse(weight, num_bits, group_size)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_quantize_symmetric_reports_the_error_of_what_is_stored(num_bits):
    weight = torch.randn(700, 128).bfloat16()
    quantized = quantize_symmetric(weight, num_bits, 64)
    stored = dequantize(quantized.packed, quantized.scale, num_bits)
    assert quantized.packed.shape == (700, 128 * num_bits // 32)
    assert (quantized.scale.shape, quantized.scale.dtype) == ((700, 2), torch.bfloat16)
    assert quantized.mse == pytest.approx((stored - weight.float()).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.0123, 3.0e38, 1e-30])
def test_quantize_symmetric_keeps_constant_groups_exact(num_bits, value):
    weight = torch.full((2, 64), value).bfloat16().float()
    assert torch.equal(restored(weight, num_bits, 32), weight)


def test_quantize_symmetric_gives_the_largest_weight_the_negative_code():
    weight = torch.zeros(2, 32)
    weight[0, 3], weight[1, 5] = 1.0, -1.0
    codes = unpack(quantize_symmetric(weight, 4, 32).packed, 4)
    assert codes[0, 3] == codes[1, 5] == -8


def test_quantize_symmetric_does_not_depend_on_the_other_rows():
    weight = torch.randn(1200, 128)
    whole, part = quantize_symmetric(weight, 4, 32), quantize_symmetric(weight[700:900], 4, 32)
    assert torch.equal(whole.packed[700:900], part.packed)
    assert torch.equal(whole.scale[700:900], part.scale)


@pytest.mark.parametrize(
    ("weight", "num_bits", "message"),
    [
        (torch.full((2, 64), float("nan")), 4, "expected finite values"),
        (torch.full((2, 64), float("inf")), 8, "expected finite values"),
        (torch.zeros(2, 64), 3, "num_bits: expected one of"),
        (torch.zeros(2, 48), 4, "in_features=48 is not divisible by group_size=32"),
    ],
)
def test_quantize_symmetric_refuses(weight, num_bits, message):
    with pytest.raises(ValueError, match=message):
        quantize_symmetric(weight, num_bits, 32)
