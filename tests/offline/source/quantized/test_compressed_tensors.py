"""What compressed-tensors writes: read as it decompresses it, compressor by compressor, and converted."""

import json
import shutil

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file

from alphaq_vllm import convert, dequantize, validate
from offline.source.checkpoint import SINGLE, open_checkpoint
from offline.source.families import find_experts, load_matrix
from tests.offline.quantizers.samples import assert_rounded_to_8_bits

ALONE = "model.layers.1.mlp.experts.2.up_proj"
INT, FLOAT = {"type": "int", "num_bits": 4}, {"type": "float", "num_bits": 8}
FP4 = {"type": "float", "num_bits": 4}
STATIC = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
DYNAMIC = QuantizationArgs(num_bits=8, type="int", strategy="token", symmetric=True, dynamic=True)
PARTS = ("_packed", "_scale", "_zero_point")
# Format, arguments of the weights' quantization, and of the activations'.
KINDS = {
    "int4 as Kimi": ("pack-quantized", {**INT, "strategy": "group", "group_size": 32}, None),
    "int4 with zero points": (
        "pack-quantized", {**INT, "strategy": "group", "group_size": 64, "symmetric": False}, None,
    ),
    "int4 in rows": ("pack-quantized", {**INT, "strategy": "channel"}, None),
    "int8 in words": ("pack-quantized", {**INT, "num_bits": 8, "strategy": "group", "group_size": 128}, None),
    "int3, ten in a word": ("pack-quantized", {**INT, "num_bits": 3, "strategy": "group", "group_size": 32}, None),
    "int4 in order of activation": (
        "pack-quantized", {**INT, "strategy": "group", "group_size": 32, "actorder": "group"}, None,
    ),
    "fp8 of a tensor": ("float-quantized", {**FLOAT, "strategy": "tensor"}, STATIC),
    "fp8 of rows": ("float-quantized", {**FLOAT, "strategy": "channel"}, None),
    "fp8 of blocks": ("float-quantized", {**FLOAT, "strategy": "block", "block_structure": [64, 32]}, None),
    "int8 of rows": ("int-quantized", {**INT, "num_bits": 8, "strategy": "channel"}, DYNAMIC),
    "nvfp4": ("nvfp4-pack-quantized", {**FP4, "strategy": "tensor_group", "group_size": 16}, None),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {**FP4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}, None,
    ),
}  # fmt: skip


def compressed(weight, form, scheme):
    """The tensors that the library stores for a weight, and the weight that it makes of them."""
    args = scheme.weights
    state, order = {"weight": weight.clone()}, None
    if args.actorder:
        order = torch.arange(weight.shape[1]).div(args.group_size, rounding_mode="floor").int()
        order = order[torch.randperm(len(order))]
    sizes = {"tensor": weight.shape, "channel": (1, weight.shape[1])}.get(args.strategy)
    sizes = sizes or tuple(args.block_structure or (1, args.group_size))
    padded = torch.nn.functional.pad(
        weight, (0, -weight.shape[1] % sizes[1], 0, -weight.shape[0] % sizes[0]), mode="constant"
    )
    grouped = padded if order is None else padded[:, order.argsort(stable=True)]
    blocks = grouped.unfold(0, sizes[0], sizes[0]).unfold(1, sizes[1], sizes[1])
    least, greatest = blocks.amin((-1, -2)), blocks.amax((-1, -2))
    if form.startswith("nvfp4"):
        state["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax()).view(1)
    scale, zero_point = calculate_qparams(least, greatest, args, global_scale=state.get("weight_global_scale"))
    if args.strategy == "tensor":
        scale, zero_point = scale.view(1), zero_point.view(1)
    state |= {"weight_scale": scale, "weight_zero_point": zero_point}
    if order is not None:
        state["weight_g_idx"] = order
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    return {name: tensor.contiguous().clone() for name, tensor in stored.items()}, expected


def write(path, source, kind, nested=False):
    """A copy of a checkpoint whose routed experts the library has compressed; the weights that it makes of them."""
    form, weights, activations = KINDS[kind]
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=activations, format=form
    )
    shutil.copytree(source, path)
    quantization = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
        "ignore": ["lm_head", "re:.*self_attn.*"],
    }
    config = json.loads((path / "config.json").read_bytes())
    (config["text_config"] if nested else config)["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    tensors, expected = {}, {}
    for name, tensor in load_file(path / SINGLE).items():
        if ".experts." not in name:
            tensors[name] = tensor
            continue
        stem = name.removesuffix("weight")
        stored, expected[name] = compressed(tensor, form, scheme)
        tensors |= {f"{stem}{part}": value for part, value in stored.items()}
        if activations and not activations.dynamic:
            tensors[f"{stem}input_scale"] = torch.ones(1)
    save_file(tensors, path / SINGLE)
    return expected


@pytest.mark.parametrize("kind", KINDS)
def test_open_checkpoint_reads_what_compressed_tensors_decompresses(tiny_model, tmp_path, kind):
    expected = write(tmp_path / "source", tiny_model("deepseek_v3"), kind)
    original = open_checkpoint(str(tiny_model("deepseek_v3")))
    source = open_checkpoint(str(tmp_path / "source"))
    assert (source.fault, set(source.tensors)) == ("", set(original.tensors))
    matrices = {matrix.tensor: matrix for matrix in find_experts(source).matrices}
    assert set(matrices) == set(expected)
    for name, weight in expected.items():
        loaded = load_matrix(source, matrices[name])
        assert loaded.shape == weight.shape
        # The library computes in the dtype of the scales.
        torch.testing.assert_close(loaded, weight.float(), rtol=2**-7, atol=0)
        assert torch.equal(source.load(name), loaded.bfloat16())
    assert len(expected) == 12


@pytest.mark.parametrize(("model_type", "nested"), [("deepseek_v3", False), ("qwen3_5_moe", True)])
def test_convert_takes_int4_as_kimi_has_it(tiny_model, tmp_path, model_type, nested):
    expected = write(tmp_path / "source", tiny_model(model_type), "int4 as Kimi", nested)
    source = open_checkpoint(str(tmp_path / "source"))
    widths = {matrix.name: 8 for matrix in find_experts(source).matrices}
    summary = convert(tmp_path / "source", tmp_path / "out", bit_map=widths, quantizer="mse")
    assert "compressed-tensors, 4 bits for a weight of the experts; more bits than that add nothing" in str(summary)
    config = json.loads((tmp_path / "out/config.json").read_bytes())
    assert config["quantization_config"]["quant_method"] == "alphaq"
    assert "quantization_config" not in config.get("text_config", {})
    validate(tmp_path / "out", source=tmp_path / "source")
    dequantize(tmp_path / "out", tmp_path / "dequantized", dtype="float32")
    output = open_checkpoint(str(tmp_path / "dequantized"))
    assert set(output.tensors) == set(source.tensors) and output.quantization is None
    for name, weight in expected.items():
        assert_rounded_to_8_bits(output.load(name), weight)


def test_open_checkpoint_reads_stacked_experts_with_zero_points(tmp_path):
    # Twelve rows fill one word of zero points and half of another.
    torch.manual_seed(3)
    form, weights, _ = KINDS["int4 with zero points"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), format=form)
    experts = [compressed(torch.randn(12, 64), form, scheme) for _ in range(3)]
    stored = {part: torch.stack([tensors[f"weight{part}"] for tensors, _ in experts]) for part in PARTS}
    save_file({f"experts.up_proj{part}": tensor for part, tensor in stored.items()}, tmp_path / SINGLE)
    quantization = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    source = open_checkpoint(str(tmp_path))
    tensor = source.tensors["experts.up_proj"]
    assert (source.fault, tensor.spec.shape) == ("", (3, 12, 64))
    for index, (_, expected) in enumerate(experts):
        torch.testing.assert_close(tensor.load_float32(index), expected, rtol=2**-22, atol=0)
    assert torch.equal(tensor.load(), tensor.load_float32().bfloat16())


BAD = {
    "scale missing": (
        lambda t: t.pop(f"{ALONE}.weight_scale"), f"{ALONE}.weight_packed: expected {ALONE}.weight_scale beside it",
    ),
    "codes missing": (
        lambda t: t.pop(f"{ALONE}.weight_packed"), f"{ALONE}.weight_.*: expected the codes of a quantized tensor",
    ),
    "scale of other groups": (
        lambda t: t.update({f"{ALONE}.weight_scale": torch.ones(128, 2)}),
        r"expected int32 words of 4 bits in groups of 32 with .* got shape \(128, 16\) .* of shape \(128, 2\)",
    ),
    "scale of another dtype": (
        lambda t: t.update({f"{ALONE}.weight_scale": torch.ones(128, 4, dtype=torch.int8)}), "got .* torch.int8 scales",
    ),
    "shape of one number": (
        lambda t: t.update({f"{ALONE}.weight_shape": torch.ones(1, dtype=torch.int64)}),
        r"expected its weight_shape of shape \(2,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_find_experts_refuses_bad_tensors_of_compressed_tensors(tiny_model, tmp_path, name):
    edit, message = BAD[name]
    write(tmp_path / "source", tiny_model("deepseek_v3"), "int4 as Kimi")
    edit_tensors(tmp_path / "source", edit)
    source = open_checkpoint(str(tmp_path / "source"))
    with pytest.raises(ValueError, match=message):
        find_experts(source)


def test_convert_refuses_a_shape_that_is_another_than_that_of_the_codes(tiny_model, tmp_path):
    write(tmp_path / "source", tiny_model("deepseek_v3"), "int4 as Kimi")
    edit_tensors(tmp_path / "source", lambda t: t.update({f"{ALONE}.weight_shape": torch.tensor([128, 96])}))
    with pytest.raises(ValueError, match=r"expected weight_shape \(128, 128\) as the codes have it, got \[128, 96\]"):
        convert(tmp_path / "source", tmp_path / "out", mode="uniform", quantizer="mse")
    assert not (tmp_path / "out").exists()


def edit_tensors(path, edit):
    tensors = load_file(path / SINGLE)
    edit(tensors)
    save_file(tensors, path / SINGLE)
