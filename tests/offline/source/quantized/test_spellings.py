"""Weights of 8 bits and NVFP4 in every spelling: compared with what the formats' publishers say that they mean."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaq_vllm import convert, validate
from offline.source.checkpoint import SINGLE, open_checkpoint
from offline.source.families import find_experts, load_matrix

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
NOT_QUANTIZED = ("embed", "lm_head", "norm", "gate.weight", "visual")


def of_blocks(weight, block, powers=False):
    """``(codes, scale)`` in float8, and what they mean in float64: every block has a scale."""
    rows, columns = (-(-size // edge) for size, edge in zip(weight.shape, block, strict=True))
    padded = torch.zeros(rows * block[0], columns * block[1], dtype=torch.float64)
    padded[: weight.shape[0], : weight.shape[1]] = weight.double()
    blocks = padded.view(rows, block[0], columns, block[1])
    scale = (blocks.abs().amax((1, 3)) / 448).float().clamp(min=2.0**-60)
    scale = scale.log2().ceil().exp2() if powers else scale
    codes = (blocks / scale.double()[:, None, :, None]).to(torch.float8_e4m3fn)
    means = (codes.double() * scale.double()[:, None, :, None]).view_as(padded)
    cut = slice(weight.shape[0]), slice(weight.shape[1])
    return codes.view_as(padded)[cut].contiguous(), scale, means[cut]


def per_tensor(name, weight):
    codes, scale, means = of_blocks(weight, weight.shape)
    return {
        name: codes,
        f"{name}_scale": scale.view(()),
        f"{name.removesuffix('weight')}input_scale": torch.ones(()),
    }, means


def per_row(name, weight):
    codes, scale, means = of_blocks(weight, (1, weight.shape[1]))
    return {name: codes, f"{name}_scale": scale.view(-1)}, means


def fbgemm(name, weight):
    codes, scale, means = of_blocks(weight, (1, weight.shape[1]))
    ub = f"{name.removesuffix('weight')}input_scale_ub"
    return {name: codes, f"{name}_scale": scale, ub: torch.ones(1)}, means


def mistral(name, weight):
    codes, scale, means = of_blocks(weight, weight.shape)
    activation = f"{name.removesuffix('weight')}activation_scale"
    return {name: codes, f"{name}_scale_inv": scale.view(()), activation: torch.ones(())}, means


def deepseek_v3(name, weight):
    codes, scale, means = of_blocks(weight, (128, 128))
    return {name: codes, f"{name}_scale_inv": scale}, means


def modelopt_blocks(name, weight):
    codes, scale, means = of_blocks(weight, (128, 128))
    return {name: codes, f"{name}_scale": scale[:, None, :, None]}, means


def mxfp8(name, weight):
    codes, scale, means = of_blocks(weight, (1, 32), powers=True)
    return {name: codes, f"{name}_scale": (scale.log2() + 127).to(torch.uint8)}, means


def deepseek_v4(name, weight):
    """Experts in MXFP4, the rest in blocks of 128 with scales that are powers of two."""
    scale_name = f"{name.removesuffix('weight')}scale"
    if ".experts." not in name:
        codes, scale, means = of_blocks(weight, (128, 128), powers=True)
        return {name: codes, scale_name: scale.to(torch.float8_e8m0fnu)}, means
    groups = weight.double().unflatten(-1, (-1, 32))
    scale = (groups.abs().amax(-1) / 6).clamp(min=2.0**-60).log2().ceil().exp2()
    packed, means = e2m1(groups, scale)
    return {name: packed.view(torch.int8), scale_name: scale.to(torch.float8_e8m0fnu)}, means


def quark_fp8(name, weight):
    codes, scale, means = of_blocks(weight, (1, weight.shape[1]))
    activation = f"{name.removesuffix('weight')}input_scale"
    return {name: codes, f"{name}_scale": scale.view(-1), activation: torch.ones(1)}, means


def quark_mxfp4(name, weight):
    """Experts in MXFP4 with scales as bytes, the rest in float8."""
    if ".experts." not in name:
        return quark_fp8(name, weight)
    groups = weight.double().unflatten(-1, (-1, 32))
    scale = (groups.abs().amax(-1) / 6).clamp(min=2.0**-60).log2().ceil().exp2()
    packed, means = e2m1(groups, scale)
    return {name: packed, f"{name}_scale": (scale.log2() + 127).to(torch.uint8)}, means


def modelopt_nvfp4(name, weight):
    groups = weight.double().unflatten(-1, (-1, 16))
    second = (groups.abs().amax() / 6 / 448).float()
    scale = (groups.abs().amax(-1) / 6 / second).to(torch.float8_e4m3fn)
    packed, means = e2m1(groups, scale.double() * second.double())
    stem = name.removesuffix("weight")
    return {
        name: packed,
        f"{name}_scale": scale,
        f"{name}_scale_2": second,
        f"{stem}input_scale": torch.ones(()),
    }, means


def e2m1(groups, scale):
    """``groups`` ``[rows, groups, size]`` as codes, two in a byte, and what these mean with the scale of each group."""
    codes = (groups / scale.clamp(min=2.0**-90).unsqueeze(-1)).unsqueeze(-1).sub(E2M1).abs().argmin(-1)
    means = (E2M1[codes] * scale.unsqueeze(-1)).flatten(1)
    codes = codes.flatten(1).to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4, means


QUARK_FP8 = {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 0, "group_size": None}}
QUARK_MXFP4 = {"weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}}
# How a weight is written, quantization_config, whether that is an old ModelOpt's, and bits of a code.
SPELLINGS = {
    "ModelOpt fp8": (per_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}, False, 8),
    "old ModelOpt fp8": (per_tensor, {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, True, 8),
    "ModelOpt fp8 of rows": (
        per_row,
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        False,
        8,
    ),
    "ModelOpt fp8 of blocks": (modelopt_blocks, {"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"}, False, 8),
    "ModelOpt mxfp8": (mxfp8, {"quant_method": "modelopt", "quant_algo": "MXFP8"}, False, 8),
    "ModelOpt nvfp4": (modelopt_nvfp4, {"quant_method": "modelopt_fp4", "quant_algo": "NVFP4"}, False, 4),
    "old ModelOpt nvfp4": (modelopt_nvfp4, {"quant_algo": "NVFP4", "group_size": 16}, True, 4),
    "DeepSeek-V3": (
        deepseek_v3,
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        False,
        8,
    ),
    "Mistral": (mistral, {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}, False, 8),
    "fbgemm": (fbgemm, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, False, 8),
    "Quark fp8": (
        quark_fp8,
        {"quant_method": "quark", "global_quant_config": QUARK_FP8, "layer_quant_config": {}},
        False,
        8,
    ),
    "Quark mxfp4": (
        quark_mxfp4,
        {"quant_method": "quark", "global_quant_config": QUARK_MXFP4, "layer_quant_config": {"*attn*": QUARK_FP8}},
        False,
        4,
    ),
    "DeepSeek-V4": (
        deepseek_v4,
        {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
        False,
        4,
    ),
}


def write(path, source, spelling, nested=False):
    """A copy of a checkpoint in another spelling, and what its quantized weights mean."""
    spell, quantization, old, _ = SPELLINGS[spelling]
    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_bytes())
    if old:
        producer = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": quantization}
        (path / "hf_quant_config.json").write_text(json.dumps(producer))
    else:
        (config["text_config"] if nested else config)["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config))
    tensors, meanings = {}, {}
    for name, tensor in load_file(path / SINGLE).items():
        if tensor.ndim == 2 and not any(part in name for part in NOT_QUANTIZED):
            stored, meanings[name] = spell(name, tensor)
            tensors |= stored
        else:
            tensors[name] = tensor
    if old:
        tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(())
    save_file(tensors, path / SINGLE)
    return meanings


def check(source, meanings):
    for name, meaning in meanings.items():
        loaded = source.tensors[name].load_float32()
        torch.testing.assert_close(loaded.double(), meaning, rtol=2**-22, atol=0)
        assert torch.equal(source.load(name), loaded.bfloat16())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_open_checkpoint_reads_every_spelling(tiny_model, tmp_path, spelling):
    meanings = write(tmp_path / "source", tiny_model("qwen2_moe"), spelling)
    source = open_checkpoint(str(tmp_path / "source"))
    assert (source.fault, set(source.tensors)) == ("", set(open_checkpoint(str(tiny_model("qwen2_moe"))).tensors))
    check(source, meanings)
    for matrix in find_experts(source).matrices:
        assert torch.equal(load_matrix(source, matrix), source.tensors[matrix.tensor].load_float32())


@pytest.mark.parametrize("spelling", ["old ModelOpt fp8", "ModelOpt nvfp4", "DeepSeek-V4", "Quark mxfp4"])
def test_convert_takes_every_spelling(tiny_model, tmp_path, spelling):
    write(tmp_path / "source", tiny_model("qwen2_moe"), spelling)
    summary = convert(tmp_path / "source", tmp_path / "out", bits=3, mode="uniform", quantizer="mse")
    assert summary.source_bits == SPELLINGS[spelling][3]
    assert ("hf_quant_config.json (on the source's quantization)" in summary.left) == spelling.startswith("old")
    assert not (tmp_path / "out/hf_quant_config.json").exists()
    validate(tmp_path / "out", source=tmp_path / "source")
    output = open_checkpoint(str(tmp_path / "out"))
    assert {output.spec(name).dtype for name in output.tensors if name.endswith("proj.weight")} == {torch.bfloat16}


@pytest.mark.parametrize("spelling", ["Mistral", "DeepSeek-V4"])
def test_convert_takes_a_config_that_is_nested(tiny_model, tmp_path, spelling):
    meanings = write(tmp_path / "source", tiny_model("qwen3_5_moe"), spelling, nested=True)
    check(open_checkpoint(str(tmp_path / "source")), meanings)
    convert(tmp_path / "source", tmp_path / "out", bits=3, mode="uniform", quantizer="mse")
    config = json.loads((tmp_path / "out/config.json").read_bytes())
    assert "quantization_config" in config and "quantization_config" not in config["text_config"]
    validate(tmp_path / "out", source=tmp_path / "source")


@pytest.mark.parametrize("shape", [(4,), (4, 1, 1), (1, 1, 1), (4, 1, 64), (4, 128, 1)])
def test_load_matrix_reads_stacked_experts_that_share_scales(tmp_path, shape):
    torch.manual_seed(0)
    module = "model.layers.0.mlp.experts"
    tensors = {
        f"{module}.gate_up_proj": torch.randn(4, 128, 64).to(torch.float8_e4m3fn),
        f"{module}.gate_up_proj_scale_inv": torch.rand(shape),
        f"{module}.gate_up_proj_activation_scale": torch.ones(4),
        f"{module}.down_proj": torch.randn(4, 64, 64).to(torch.float8_e4m3fn),
        f"{module}.down_proj_scale_inv": torch.rand(4, 1, 1),
        f"{module}.down_proj_activation_scale": torch.ones(4),
    }
    save_file(tensors, tmp_path / SINGLE)
    config = {"model_type": "olmoe", "num_experts": 4, "hidden_size": 64, "num_hidden_layers": 1}
    config["quantization_config"] = SPELLINGS["Mistral"][1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_checkpoint(str(tmp_path))
    matrices = find_experts(source).matrices
    assert len(matrices) == 12
    for matrix in matrices:
        scale = tensors[f"{matrix.tensor}_scale_inv"].double()
        values = tensors[matrix.tensor].double() * (scale.view(4, 1, 1) if scale.ndim == 1 else scale)
        torch.testing.assert_close(load_matrix(source, matrix).double(), matrix.view(values), rtol=2**-22, atol=0)
        torch.testing.assert_close(source.load(matrix.tensor).double(), values.bfloat16().double(), rtol=2**-7, atol=0)


def test_find_experts_knows_the_family_before_it_looks_for_scales(tiny_model, tmp_path):
    write(tmp_path / "source", tiny_model("qwen2_moe"), "DeepSeek-V4")
    tensors = load_file(tmp_path / "source" / SINGLE)
    name = "model.layers.1.mlp.experts.2.up_proj.scale"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "source" / SINGLE)
    config = json.loads((tmp_path / "source/config.json").read_bytes())
    with pytest.raises(
        ValueError, match=r"up_proj\.weight: expected .*weight_scale_inv as the scale of an int8 tensor"
    ):
        find_experts(open_checkpoint(str(tmp_path / "source")))
    (tmp_path / "source/config.json").write_text(json.dumps({**config, "model_type": "deepseek_v41"}))
    with pytest.raises(ValueError, match=r"model_type 'deepseek_v41' is not supported: "):
        find_experts(open_checkpoint(str(tmp_path / "source")))


def test_find_experts_names_a_second_scale_that_is_missing(tiny_model, tmp_path):
    write(tmp_path / "source", tiny_model("qwen2_moe"), "ModelOpt nvfp4")
    tensors = load_file(tmp_path / "source" / SINGLE)
    tensors.pop("model.layers.1.mlp.experts.2.up_proj.weight_scale_2")
    save_file(tensors, tmp_path / "source" / SINGLE)
    with pytest.raises(ValueError, match=r"experts\.2\.up_proj\.weight: expected a second scale, of the whole tensor"):
        find_experts(open_checkpoint(str(tmp_path / "source")))


@pytest.mark.parametrize("algorithm", ["W4A8_AWQ", "INT8"])
def test_find_experts_names_the_kind_of_modelopt_that_it_does_not_read(tiny_model, tmp_path, algorithm):
    path = shutil.copytree(tiny_model("qwen2_moe"), tmp_path / "source")
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": algorithm}}))
    with pytest.raises(ValueError, match=rf"already quantized \(quant_method 'modelopt, {algorithm}'\)"):
        find_experts(open_checkpoint(str(path)))


@pytest.mark.parametrize(("spelling", "bits"), [("ModelOpt nvfp4", 4), ("DeepSeek-V4", 4), ("Mistral", None)])
def test_bound_is_one_where_scales_tell_it(tiny_model, tmp_path, spelling, bits):
    meanings = write(tmp_path / "source", tiny_model("qwen2_moe"), spelling)
    source = open_checkpoint(str(tmp_path / "source"))
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    bound, greatest = source.tensors[name].bound(), float(meanings[name].abs().max())
    assert bound is None if bits is None else greatest <= bound <= 2 * greatest


def test_open_checkpoint_takes_modelopts_word_for_a_cache_alone_that_is_quantized(tiny_model, tmp_path):
    path = shutil.copytree(tiny_model("qwen2_moe"), tmp_path / "source")
    quantization = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    tensors = load_file(path / SINGLE)
    save_file({**tensors, "model.layers.0.self_attn.v_proj.v_scale": torch.ones(())}, path / SINGLE)
    source = open_checkpoint(str(path))
    assert set(source.tensors) == set(tensors)
    assert len(find_experts(source).matrices) == 24


def test_load_matrix_reads_stacked_experts_of_fbgemm(tmp_path):
    """As transformers' experts of Llama-4: a scale for each output feature, which comes last."""
    torch.manual_seed(0)
    module = "model.layers.0.feed_forward.experts"
    scales = {"gate_up_proj": torch.rand(4, 1, 128), "down_proj": torch.rand(4, 64, 1)}
    codes = {name: torch.randn(4, 64, scale.numel() // 4).to(torch.float8_e4m3fn) for name, scale in scales.items()}
    tensors = {f"{module}.{name}": tensor for name, tensor in codes.items()}
    save_file({**tensors, **{f"{module}.{name}_scale": scale for name, scale in scales.items()}}, tmp_path / SINGLE)
    config = {"model_type": "llama4_text", "num_local_experts": 4, "hidden_size": 64, "num_hidden_layers": 1}
    config["quantization_config"] = {"quant_method": "fbgemm_fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_checkpoint(str(tmp_path))
    matrices = find_experts(source).matrices
    assert len(matrices) == 12
    for matrix in matrices:
        name = matrix.tensor.rpartition(".")[2]
        values = codes[name].double() * scales[name].double().view(4, 1, -1)
        torch.testing.assert_close(load_matrix(source, matrix).double(), matrix.view(values), rtol=2**-22, atol=0)
