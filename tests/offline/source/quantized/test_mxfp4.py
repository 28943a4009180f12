"""gpt-oss as published, in MXFP4: read as transformers reads it, and converted."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

from alphaq_vllm import convert
from offline.source.checkpoint import SINGLE, open_checkpoint
from offline.source.families import find_experts, load_matrix

EXPERTS = "model.layers.{}.mlp.experts.{}_proj"
VALUES = torch.tensor(FP4_VALUES)


def to_mxfp4(weight):
    """``[experts, in, out]`` as ``(blocks, scales)``, by the definition of the format: out first, groups of 32."""
    groups = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = groups.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - 2
    codes = (groups / exponents.exp2().unsqueeze(-1)).unsqueeze(-1).sub(VALUES).abs().argmin(-1)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return blocks.to(torch.uint8), (exponents + 127).to(torch.uint8)


def write(path, source, edit=lambda tensors: None):
    """A copy of a checkpoint of gpt-oss as its publisher has it; the original's tensors and the new ones."""
    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_bytes())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (path / "config.json").write_text(json.dumps(config))
    original = load_file(path / SINGLE)
    tensors = dict(original)
    for name in original:
        if name.endswith(("gate_up_proj", "down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = to_mxfp4(tensors.pop(name))
    edit(tensors)
    save_file(tensors, path / SINGLE)
    return original, tensors


@pytest.fixture
def source(tiny_model, tmp_path):
    write(tmp_path / "mxfp4", tiny_model("gpt_oss"))
    return tmp_path / "mxfp4"


def test_open_checkpoint_reads_mxfp4_as_transformers_does(tiny_model, tmp_path):
    original, tensors = write(tmp_path / "mxfp4", tiny_model("gpt_oss"))
    # Every code and the least, the usual and great exponents occur.
    blocks, scales = EXPERTS.format(0, "down") + "_blocks", EXPERTS.format(0, "down") + "_scales"
    tensors[blocks] = (torch.arange(tensors[blocks].numel()) % 256).view(tensors[blocks].shape).to(torch.uint8)
    tensors[scales] = torch.randint(1, 255 - 3, tensors[scales].shape).to(torch.uint8)
    save_file(tensors, tmp_path / "mxfp4" / SINGLE)
    source = open_checkpoint(str(tmp_path / "mxfp4"))
    assert set(source.tensors) == set(original)
    for name in original:
        if f"{name}_blocks" in tensors:
            expected = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
            assert expected.shape == original[name].shape
        else:
            expected = original[name]
        assert (source.spec(name).shape, source.spec(name).dtype) == (tuple(expected.shape), expected.dtype)
        assert torch.equal(source.load(name), expected)
        assert torch.equal(
            torch.cat([chunk.clone() for chunk in source.tensors[name].chunks(2**20)]), expected.flatten()
        )
    whole = source.tensors[EXPERTS.format(1, "gate_up")]
    assert whole.nbytes == sum(tensors[EXPERTS.format(1, "gate_up") + end].nbytes for end in ("_blocks", "_scales"))


def test_load_matrix_reads_one_expert_of_mxfp4(source):
    checkpoint = open_checkpoint(str(source))
    matrices = find_experts(checkpoint).matrices
    assert len(matrices) == 2 * 4 * 3
    for matrix in matrices:
        expected = matrix.view(checkpoint.load(matrix.tensor)).float()
        assert torch.equal(load_matrix(checkpoint, matrix), expected)


def test_convert_takes_mxfp4_and_says_what_more_bits_add(source, tmp_path):
    summary = convert(source, tmp_path / "out", bits=5, candidate_bits="4,5,6", mode="uniform")
    row = "mxfp4, 4 bits for a weight of the experts; more bits than that add nothing; what is not quantized again"
    assert row in str(summary)
    assert (summary.source_method, summary.source_bits) == ("mxfp4", 4)
    output = open_checkpoint(str(tmp_path / "out"))
    assert output.config["quantization_config"]["quant_method"] == "alphaq"
    kept = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(output.load(kept), open_checkpoint(str(source)).load(kept))
    fewer = convert(source, tmp_path / "fewer", bits=3, mode="uniform")
    assert "add nothing" not in str(fewer)


def test_convert_names_the_group_size_that_the_width_of_gpt_oss_takes(tmp_path):
    # 320 is 5 times 64, as 2880 is 45 times 64.
    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=64, hidden_size=320, intermediate_size=320, num_hidden_layers=1, num_local_experts=2,
        num_experts_per_tok=1, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        layer_types=["full_attention"],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    write(tmp_path / "mxfp4", tmp_path / "bf16")
    with pytest.raises(ValueError, match=r"320 is not divisible by group_size=128: convert with `group_size=64`"):
        convert(tmp_path / "mxfp4", tmp_path / "out", group_size=128)
    summary = convert(tmp_path / "mxfp4", tmp_path / "out", dry_run=True, mode="uniform")
    assert summary.group_size == 64


BAD = {
    "scales missing": (
        lambda t: t.pop(EXPERTS.format(1, "down") + "_scales"),
        "down_proj_blocks: expected .*down_proj_scales beside it, got none",
    ),
    "blocks missing": (
        lambda t: t.pop(EXPERTS.format(1, "down") + "_blocks"),
        "down_proj_scales: expected the codes of a quantized tensor",
    ),
    "scales of another shape": (
        lambda t: t.update({EXPERTS.format(1, "down") + "_scales": torch.ones(4, 128, 2, dtype=torch.uint8)}),
        r"expected two codes in a byte, in groups of 32 for scales of shape \(4, 128, 2\), got shape",
    ),
    "scales of another dtype": (
        lambda t: t.update({EXPERTS.format(1, "down") + "_scales": torch.ones(4, 128, 8)}),
        "expected scales of each row in uint8, float8_e8m0fnu or float8_e4m3fn, got torch.float32",
    ),
    "both kinds": (
        lambda t: t.update({EXPERTS.format(1, "down"): torch.ones(4, 256, 128)}),
        "down_proj_blocks: expected it in the place of .*, got both",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_find_experts_refuses_bad_mxfp4(tiny_model, tmp_path, name):
    edit, message = BAD[name]
    write(tmp_path / "mxfp4", tiny_model("gpt_oss"), edit)
    checkpoint = open_checkpoint(str(tmp_path / "mxfp4"))
    with pytest.raises(ValueError, match=message):
        find_experts(checkpoint)


def test_convert_refuses_a_scale_that_is_not_a_number(tiny_model, tmp_path):
    write(
        tmp_path / "mxfp4",
        tiny_model("gpt_oss"),
        lambda tensors: tensors[EXPERTS.format(1, "down") + "_scales"][2, 5].fill_(255),
    )
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.2\.down_proj.*NaN or infinite"):
        convert(tmp_path / "mxfp4", tmp_path / "out", mode="uniform")
    assert not (tmp_path / "out").exists()
