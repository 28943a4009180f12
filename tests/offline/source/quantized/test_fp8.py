"""Block-fp8 sources: read as the values they mean, and refused when a scale is missing or wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaq_vllm import convert, dequantize
from offline.source.checkpoint import INDEX, SINGLE, open_checkpoint
from offline.source.families import find_experts, load_matrix
from tests.offline.quantizers.samples import assert_rounded_to_8_bits

SUFFIX = "_scale_inv"
NOT_FP8 = ("embed", "lm_head", "norm", "gate.weight")
WEIGHT = "model.layers.1.mlp.experts.2.up_proj.weight"


def to_fp8(weight, block):
    """The float8 weight, and a scale per block, of which the last in each dimension may be smaller."""
    scale = torch.empty(-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1]))
    quantized = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale[i, j] = weight[part].abs().max().float() / 448
            quantized[part] = (weight[part].float() / scale[i, j]).to(torch.float8_e4m3fn)
    return quantized, scale


def meaning(quantized, scale, block):
    """The values, by the definition: element by element in float64."""
    rows = torch.arange(quantized.shape[0]) // block[0]
    columns = torch.arange(quantized.shape[1]) // block[1]
    return quantized.double() * scale.double()[rows][:, columns]


def write(path, tensors, config, block):
    """A checkpoint of two shards, in the second of which are all scales."""
    path.mkdir()
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": fp8}))
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in tensors.items():
        shards["b.safetensors" if name.endswith(SUFFIX) else "a.safetensors"][name] = tensor
    for shard, content in shards.items():
        save_file(content, path / shard)
    weight_map = {name: shard for shard, content in shards.items() for name in content}
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.fixture(scope="module")
def sources(tiny_model):
    """``(tensors, config)`` of a tiny DeepSeek-V3 with fp8 weights, by block size."""
    made = {}

    def make(block):
        if block not in made:
            original = load_file(tiny_model("deepseek_v3") / SINGLE)
            config = json.loads((tiny_model("deepseek_v3") / "config.json").read_bytes())
            tensors = {}
            for name, tensor in original.items():
                tensors[name] = tensor
                if tensor.ndim == 2 and not any(part in name for part in NOT_FP8):
                    tensors[name], tensors[f"{name}{SUFFIX}"] = to_fp8(tensor, block)
            made[block] = tensors, config
        return made[block]

    return make


@pytest.mark.parametrize("block", [(128, 128), (48, 80), (1, 128)])
def test_open_checkpoint_reads_fp8_as_the_values_it_means(sources, tmp_path, block):
    tensors, config = sources(block)
    source = open_checkpoint(str(write(tmp_path / "fp8", tensors, config, block)))
    fp8 = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    assert WEIGHT in fp8 and "model.layers.0.self_attn.o_proj.weight" in fp8
    assert set(source.tensors) == {name for name in tensors if not name.endswith(SUFFIX)}
    for name in source.tensors:
        loaded = source.load(name)
        assert (tuple(loaded.shape), loaded.dtype) == (source.spec(name).shape, source.spec(name).dtype)
        if name in fp8:
            assert loaded.dtype == torch.bfloat16
            expected = meaning(tensors[name], tensors[f"{name}{SUFFIX}"], block)
            torch.testing.assert_close(loaded.double(), expected, rtol=2**-8, atol=0)
            assert source.tensors[name].nbytes == tensors[name].nbytes + tensors[f"{name}{SUFFIX}"].nbytes
        else:
            assert torch.equal(loaded, tensors[name])
    assert source.nbytes == sum((source.path / shard).stat().st_size for shard in ("a.safetensors", "b.safetensors"))


def test_open_checkpoint_reads_fp8_of_blocks_that_a_nested_config_declares(sources, tmp_path):
    tensors, config = sources((48, 80))
    path = write(tmp_path / "model", tensors, config, (48, 80))
    plain = open_checkpoint(str(path))
    settings = json.loads((path / "config.json").read_bytes())
    nested = {"model_type": settings.pop("model_type"), "text_config": settings}
    (path / "config.json").write_text(json.dumps(nested))
    source = open_checkpoint(str(path))
    matrices = find_experts(source).matrices
    assert matrices == find_experts(plain).matrices
    assert all(torch.equal(load_matrix(source, matrix), load_matrix(plain, matrix)) for matrix in matrices)
    assert all(source.spec(name).dtype == torch.bfloat16 for name in tensors if f"{name}{SUFFIX}" in tensors)


def test_load_matrix_does_not_round_fp8_to_bfloat16(sources, tmp_path):
    tensors, config = sources((128, 128))
    source = open_checkpoint(str(write(tmp_path / "fp8", tensors, config, (128, 128))))
    (matrix,) = (m for m in find_experts(source).matrices if m.tensor == WEIGHT)
    expected = meaning(tensors[WEIGHT], tensors[f"{WEIGHT}{SUFFIX}"], (128, 128))
    torch.testing.assert_close(load_matrix(source, matrix).double(), expected, rtol=2**-22, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_open_checkpoint_takes_scales_of_fewer_bits(sources, tmp_path, dtype):
    tensors, config = sources((128, 128))
    tensors = {name: t.to(dtype) if name.endswith(SUFFIX) else t for name, t in tensors.items()}
    source = open_checkpoint(str(write(tmp_path / "fp8", tensors, config, (128, 128))))
    expected = meaning(tensors[WEIGHT], tensors[f"{WEIGHT}{SUFFIX}"], (128, 128))
    torch.testing.assert_close(source.load(WEIGHT).double(), expected, rtol=2**-8, atol=0)


def test_load_matrix_reads_fused_fp8_experts(tmp_path):
    torch.manual_seed(0)
    shapes = {"gate_up_proj": (2, 384, 128), "down_proj": (2, 128, 192)}
    tensors, block = {}, (64, 128)
    for name, shape in shapes.items():
        parts = [to_fp8(torch.randn(shape[1:]), block) for _ in range(shape[0])]
        for suffix, part in zip(("", SUFFIX), zip(*parts, strict=True), strict=True):
            tensors[f"model.layers.0.mlp.experts.{name}{suffix}"] = torch.stack(part)
    config = {"model_type": "olmoe", "num_experts": 2, "hidden_size": 128, "num_hidden_layers": 1}
    source = open_checkpoint(str(write(tmp_path / "fp8", tensors, config, block)))
    matrices = find_experts(source).matrices
    assert len(matrices) == 6
    for matrix in matrices:
        weight, scale = tensors[matrix.tensor][matrix.expert], tensors[f"{matrix.tensor}{SUFFIX}"][matrix.expert]
        expected = meaning(weight, scale, block)
        expected = {"gate_proj": expected[:192], "up_proj": expected[192:], "down_proj": expected}[matrix.projection]
        torch.testing.assert_close(load_matrix(source, matrix).double(), expected, rtol=2**-22, atol=0)


BAD_SCALES = {
    "missing": (lambda t: t.pop(f"{WEIGHT}{SUFFIX}"), f"{WEIGHT}: expected {WEIGHT}{SUFFIX} as the scale .* got none"),
    "of nothing": (lambda t: t.pop(WEIGHT), f"{WEIGHT}{SUFFIX}: expected the codes of a quantized tensor"),
    "of a bfloat16 weight": (lambda t: t.update({WEIGHT: t[WEIGHT].bfloat16()}), "expected the codes of a quantized"),
    "of another shape": (
        lambda t: t.update({f"{WEIGHT}{SUFFIX}": torch.ones(2, 1)}),
        r"_scale_inv: expected .* of shape \(1, 1\) for blocks of \(128, 128\), got torch.float32 of shape \(2, 1\)",
    ),
    "of another dtype": (
        lambda t: t.update({f"{WEIGHT}{SUFFIX}": torch.ones(1, 1, dtype=torch.uint8)}),
        "_scale_inv: expected a float32 or bfloat16 scale",
    ),
    "of a vector": (
        lambda t: t.update({WEIGHT: torch.zeros(128, dtype=torch.float8_e4m3fn)}),
        f"{WEIGHT}: expected a float8 tensor of two or more dimensions",
    ),
}


@pytest.mark.parametrize("name", BAD_SCALES)
def test_find_experts_refuses_a_bad_scale(sources, tmp_path, name):
    edit, message = BAD_SCALES[name]
    tensors, config = sources((128, 128))
    tensors = dict(tensors)
    edit(tensors)
    source = open_checkpoint(str(write(tmp_path / "fp8", tensors, config, (128, 128))))
    with pytest.raises(ValueError, match=message):
        find_experts(source)


@pytest.fixture
def predicting(sources, tmp_path):
    """A tiny fp8 DeepSeek-V3 with a layer for multi-token prediction, as on the Hub."""
    tensors, config = sources((128, 128))
    layer = {
        name.replace("layers.1", "layers.2"): tensor.clone() for name, tensor in tensors.items() if "layers.1" in name
    }
    tensors = {**tensors, **layer, "model.layers.2.enorm.weight": torch.ones(128, dtype=torch.bfloat16)}
    return write(tmp_path / "fp8", tensors, {**config, "num_nextn_predict_layers": 1}, (128, 128))


def test_convert_writes_fp8_that_it_does_not_quantize_as_bfloat16(predicting, tmp_path):
    source = open_checkpoint(str(predicting))
    matrices = find_experts(source).matrices
    convert(
        predicting, tmp_path / "alphaq", bit_map={matrix.name: 8 for matrix in matrices}, quantizer="mse", mtp_bits=16
    )
    output = open_checkpoint(str(tmp_path / "alphaq"))
    assert output.config["quantization_config"]["quant_method"] == "alphaq"
    kept = set(source.tensors) - {matrix.tensor for matrix in matrices}
    assert {"model.layers.2.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"} <= kept
    assert {name for name in output.tensors if not name.endswith(("_packed", "_scale", "_grid"))} == kept
    for name in kept:
        assert output.spec(name).dtype not in (torch.float8_e4m3fn, torch.float8_e5m2)
        assert torch.equal(output.load(name), source.load(name))


def test_dequantize_gives_back_fp8_experts_to_8_bits(predicting, tmp_path):
    source = open_checkpoint(str(predicting))
    convert(
        predicting,
        tmp_path / "alphaq",
        bit_map={matrix.name: 8 for matrix in find_experts(source).matrices},
        quantizer="mse",
    )
    dequantize(str(tmp_path / "alphaq"), tmp_path / "dequantized")
    output = open_checkpoint(str(tmp_path / "dequantized"))
    assert set(output.tensors) == set(source.tensors)
    for matrix in find_experts(output).matrices:
        assert_rounded_to_8_bits(load_matrix(output, matrix), load_matrix(source, matrix))
