"""AWQ and GPTQ as sources of last resort: packed by vLLM's functions for them, read as the numbers that they mean."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack, gptq_pack, pack_cols

from alphaq_vllm import convert, validate
from offline.source.checkpoint import SINGLE, open_checkpoint
from offline.source.families import find_experts, load_matrix

GROUP = 32
ALONE = "model.layers.1.mlp.experts.2.up_proj"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": False, "data_type": "int"}
CONFIGS = {
    "awq": AWQ,
    "gptq": GPTQ,
    "gptq of 8 bits": {**GPTQ, "bits": 8},
    "gptq in order of activation": {**GPTQ, "desc_act": True, "checkpoint_format": "gptq"},
    "gptq, second format": {**GPTQ, "checkpoint_format": "gptq_v2"},
    "auto-round": {**AUTO_ROUND, "packing_format": "auto_round:auto_gptq"},
    "auto-round of 8 bits": {**AUTO_ROUND, "bits": 8, "extra_config": {"lm_head": {"bits": 16}}},
    "auto-round, older": {**AUTO_ROUND, "quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2"},
    "auto-round as awq": {**AUTO_ROUND, "packing_format": "auto_round:auto_awq"},
}


def quantized(weight, config):
    """Stored tensors by the last part of their names, and the numbers that they mean in float64."""
    bits, inputs = config["bits"], weight.shape[1]
    order = torch.arange(inputs) // GROUP
    if config.get("desc_act"):
        order = order[torch.randperm(inputs)]
    columns = weight.double().T
    least = torch.stack([columns[order == group].amin(0) for group in range(inputs // GROUP)])
    greatest = torch.stack([columns[order == group].amax(0) for group in range(inputs // GROUP)])
    scales = ((greatest - least) / (2**bits - 1)).half()
    # The first format of GPTQ stores zero points less one.
    awq = "awq" in (config["quant_method"], config.get("packing_format", "").removeprefix("auto_round:auto_"))
    first = not awq and config.get("checkpoint_format", "gptq") == "gptq"
    zeros = (-least / scales.double()).round().clamp(1 if first else 0, 2**bits - 1).int()
    codes = (columns / scales.double()[order] + zeros[order]).round().clamp(0, 2**bits - 1).int()
    meaning = ((codes - zeros[order]).double() * scales.double()[order]).T
    if awq:
        packed = {"qweight": awq_pack(codes, 4, *codes.shape), "qzeros": awq_pack(zeros, 4, *zeros.shape)}
    else:
        stored = zeros - 1 if first else zeros
        packed = {"qweight": gptq_pack(codes, bits, *codes.shape), "qzeros": pack_cols(stored, bits, *zeros.shape)}
        packed["g_idx"] = order.int()
    return {**{name: tensor.contiguous() for name, tensor in packed.items()}, "scales": scales}, meaning


def write(path, source, kind, edit=lambda tensors: None):
    """A copy of a checkpoint with quantized linear layers, and what they mean."""
    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIGS[kind]}))
    torch.manual_seed(2)
    tensors, meanings = {}, {}
    for name, tensor in load_file(path / SINGLE).items():
        if name.endswith("_proj.weight"):
            parts, meanings[name] = quantized(tensor, CONFIGS[kind])
            tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
        else:
            tensors[name] = tensor
    edit(tensors)
    save_file(tensors, path / SINGLE)
    return meanings


@pytest.mark.parametrize("kind", CONFIGS)
def test_open_checkpoint_reads_awq_and_gptq(tiny_model, tmp_path, kind):
    meanings = write(tmp_path / "source", tiny_model("qwen2_moe"), kind)
    source = open_checkpoint(str(tmp_path / "source"))
    assert (source.fault, set(source.tensors)) == ("", set(open_checkpoint(str(tiny_model("qwen2_moe"))).tensors))
    for name, meaning in meanings.items():
        loaded = source.tensors[name].load_float32()
        torch.testing.assert_close(loaded.double(), meaning, rtol=2**-22, atol=0)
        assert torch.equal(source.load(name), loaded.bfloat16())
    for matrix in find_experts(source).matrices:
        assert torch.equal(load_matrix(source, matrix), source.tensors[matrix.tensor].load_float32())


def test_open_checkpoint_reads_gptq_whose_last_words_are_not_full(tmp_path):
    codes, zeros = torch.randint(16, (64, 12)).int(), torch.randint(16, (2, 12)).int()
    scales, padded = torch.rand(2, 12), torch.nn.functional.pad(zeros, (0, 4))
    packed = {"qweight": gptq_pack(codes, 4, 64, 12), "qzeros": pack_cols(padded, 4, 2, 16), "scales": scales}
    save_file({f"up_proj.{name}": tensor.contiguous() for name, tensor in packed.items()}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": CONFIGS["gptq, second format"]}))
    loaded = open_checkpoint(str(tmp_path)).tensors["up_proj.weight"].load_float32()
    groups = torch.arange(64) // GROUP
    expected = ((codes - zeros[groups]).double() * scales.double()[groups]).T
    torch.testing.assert_close(loaded.double(), expected, rtol=2**-22, atol=0)


def test_convert_warns_of_a_source_that_was_rounded(tiny_model, tmp_path):
    write(tmp_path / "source", tiny_model("qwen2_moe"), "awq")
    (tmp_path / "source/quant_config.json").write_text("{}")
    summary = convert(tmp_path / "source", tmp_path / "out", bits=4, mode="uniform")
    assert "awq, 4 bits for a weight of the experts; errors of both roundings add up: convert the model" in str(summary)
    assert "quant_config.json (on the source's quantization)" in summary.left
    assert summary.quantizer == "gptq"
    validate(tmp_path / "out", source=tmp_path / "source")


BAD = {
    "zero points missing": ("awq", lambda t: t.pop(f"{ALONE}.qzeros"), f"{ALONE}.qweight: expected {ALONE}.qzeros"),
    "codes missing": ("gptq", lambda t: t.pop(f"{ALONE}.qweight"), "expected the codes of a quantized tensor"),
    "scales of another shape": (
        "awq", lambda t: t.update({f"{ALONE}.scales": torch.ones(4, 64)}),
        r"expected its scales of shape \(4, 128\) in .*, got torch.float32 of shape \(4, 64\)",
    ),
    "zero points of another dtype": (
        "gptq", lambda t: t.update({f"{ALONE}.qzeros": torch.ones(4, 16, dtype=torch.int64)}), "expected its zero",
    ),
    "no codes": (
        "awq",
        lambda t: t.update({f"{ALONE}.qweight": torch.ones(0, 16).int()}),
        r"expected codes, got none: shape \(128, 0\)",
    ),
    "groups that are not whole": (
        "awq",
        lambda t: t.update({f"{ALONE}.scales": torch.ones(3, 128), f"{ALONE}.qzeros": torch.ones(3, 16).int()}),
        "expected whole groups in 128 input features, got 3 groups",
    ),
    "a group for too few columns": (
        "gptq", lambda t: t.update({f"{ALONE}.g_idx": torch.zeros(64).int()}), r"expected its g_idx of shape \(128,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_find_experts_refuses_bad_awq_and_gptq(tiny_model, tmp_path, name):
    kind, edit, message = BAD[name]
    write(tmp_path / "source", tiny_model("qwen2_moe"), kind, edit)
    with pytest.raises(ValueError, match=message):
        find_experts(open_checkpoint(str(tmp_path / "source")))


def test_convert_refuses_a_group_that_is_not_there(tiny_model, tmp_path):
    write(tmp_path / "source", tiny_model("qwen2_moe"), "gptq", lambda t: t[f"{ALONE}.g_idx"].fill_(4))
    with pytest.raises(ValueError, match=r"g_idx: expected groups from 0 to 3, got 4"):
        convert(tmp_path / "source", tmp_path / "out", mode="uniform", quantizer="mse")
    assert not (tmp_path / "out").exists()
