"""Dequantization: exactly the stored values, in a checkpoint that transformers loads; and lies that are refused."""

import json
import shutil
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from alphaq_vllm import convert, dequantize, packing
from offline import dequantize as command
from offline.cli import run
from offline.source.alphaq import check_alphaq
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts

EXPERT = "model.layers.1.mlp.experts.2.up_proj"


def bit_map(source, width=None):
    names = sorted(matrix.name for matrix in find_experts(open_checkpoint(str(source))).matrices)
    return {name: width or 1 + i % 8 for i, name in enumerate(names)}


def tensors_of(path):
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="session")
def converted(tiny_model, tmp_path_factory):
    """``converted(model_type)``: a tiny AlphaQ checkpoint with every width, not to be changed."""
    made = {}

    def make(model_type):
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp("converted") / model_type
            source = tiny_model(model_type)
            convert(source, made[model_type], bit_map=bit_map(source), quantizer="mse")
        return made[model_type]

    return make


@pytest.fixture
def checkpoint(converted, tmp_path):
    """A copy of the tiny AlphaQ Qwen2-MoE, to be damaged."""
    return shutil.copytree(converted("qwen2_moe"), tmp_path / "checkpoint")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_dequantize_writes_the_stored_values_rounded_once(converted, tiny_model, tmp_path, dtype):
    out = tmp_path / "out"
    dequantize(str(converted("qwen2_moe")), out, dtype=dtype)
    stored, plain = tensors_of(converted("qwen2_moe")), tensors_of(out)
    target = getattr(torch, "bfloat16" if dtype == "auto" else dtype)
    originals = load_file(tiny_model("qwen2_moe") / "model.safetensors")
    assert plain.keys() == originals.keys()
    for name, num_bits in bit_map(tiny_model("qwen2_moe")).items():
        suffixes = ("weight_packed", "weight_scale", "weight_grid")
        expected = packing.dequantize(*(stored[f"{name}.{suffix}"] for suffix in suffixes), num_bits)
        assert plain[f"{name}.weight"].dtype == target
        assert torch.equal(plain.pop(f"{name}.weight"), expected.to(target))
    for name, tensor in plain.items():
        assert tensor.dtype == originals[name].dtype == torch.bfloat16
        assert torch.equal(tensor, originals[name])
    config = json.loads((out / "config.json").read_bytes())
    original = json.loads((tiny_model("qwen2_moe") / "config.json").read_bytes())
    assert config == {**original, "dtype": str(target).removeprefix("torch.")}


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3"])
def test_dequantize_makes_what_transformers_loads(converted, tiny_model, tmp_path, model_type):
    out = tmp_path / "out"
    dequantize(str(converted(model_type)), out, dtype="float32")
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    assert model.dtype == torch.float32
    plain, state = tensors_of(out), model.state_dict()
    moe_layers = [name.removesuffix(".gate_up_proj") for name in state if name.endswith("experts.gate_up_proj")]
    assert moe_layers
    gate, up, down = ("w1", "w3", "w2") if model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for module in moe_layers:
        stored = module.replace("mlp", "block_sparse_moe") if model_type == "mixtral" else module
        for expert in range(4):
            rows = torch.cat([plain[f"{stored}.{expert}.{name}.weight"] for name in (gate, up)])
            assert torch.equal(state[f"{module}.gate_up_proj"][expert], rows)
            assert torch.equal(state[f"{module}.down_proj"][expert], plain[f"{stored}.{expert}.{down}.weight"])


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral"])
def test_dequantize_at_eight_bits_answers_like_the_source(tiny_model, tmp_path, model_type):
    source = tiny_model(model_type)
    convert(source, tmp_path / "quantized", bit_map=bit_map(source, 8), quantizer="mse")
    dequantize(str(tmp_path / "quantized"), tmp_path / "plain", dtype="float32")
    tokens = torch.arange(64)[None]
    logits = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
        for path in (source, tmp_path / "plain")
    ]
    assert (logits[0] - logits[1]).norm() < 0.02 * logits[0].norm()


def test_dequantize_is_a_source_again(converted, tmp_path):
    dequantize(str(converted("qwen2_moe")), tmp_path / "plain")
    assert len(find_experts(open_checkpoint(str(tmp_path / "plain"))).matrices) == 24


def edit_config(path, edit):
    config = json.loads((path / "config.json").read_bytes())
    edit(config)
    (path / "config.json").write_text(json.dumps(config))


def edit_bits(path, edit):
    edit_config(path, lambda config: edit(config["quantization_config"]["num_bits"]))


def edit_tensors(path, edit):
    """Change the tensors of the only shard, and the index with them."""
    tensors = tensors_of(path)
    edit(tensors)
    shard = next(path.glob("*.safetensors")).name
    save_file(tensors, path / shard)
    index = {"weight_map": dict.fromkeys(tensors, shard)}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def widen(bits):
    digits = bits["model.layers.1.mlp.experts"]["up_proj"]
    bits["model.layers.1.mlp.experts"]["up_proj"] = "".join(
        "1" if digit == "8" else str(int(digit) + 1) for digit in digits
    )


MODULE = "model.layers.1.mlp.experts"
LIES = {
    "scale missing": (
        lambda p: edit_tensors(p, lambda t: t.pop(f"{EXPERT}.weight_scale")),
        f"got none of {EXPERT}.weight_scale",
    ),
    "matrix missing": (
        lambda p: edit_tensors(p, lambda t: [t.pop(n) for n in list(t) if n.startswith(EXPERT)]),
        f"got none of {EXPERT}.weight_packed",
    ),
    "first gate missing": (
        lambda p: edit_tensors(p, lambda t: t.pop(f"{MODULE}.0.gate_proj.weight_packed")),
        f"{MODULE}.0.gate_proj.weight_packed: expected a matrix of packed codes, got none",
    ),
    "weight left over": (
        lambda p: edit_tensors(p, lambda t: t.update({f"{EXPERT}.weight": torch.zeros(128, 128)})),
        f"got also {EXPERT}.weight",
    ),
    "expert too many": (
        lambda p: edit_tensors(p, lambda t: t.update({f"{MODULE}.4.up_proj.weight_scale": torch.zeros(1)})),
        f"got also {MODULE}.4.up_proj.weight_scale",
    ),
    "codes of a module that is not listed": (
        lambda p: edit_bits(p, lambda bits: bits.pop(MODULE)),
        f"got also {MODULE}",
    ),
    "scale of the wrong shape": (
        lambda p: edit_tensors(p, lambda t: t.update({f"{EXPERT}.weight_scale": torch.ones(64, 2).bfloat16()})),
        rf"{EXPERT}.weight_scale: expected .*\(128, 1\).* got .*\(64, 2\)",
    ),
    "scale of the wrong dtype": (
        lambda p: edit_tensors(p, lambda t: t.update({f"{EXPERT}.weight_scale": torch.ones(128, 1)})),
        f"{EXPERT}.weight_scale: expected .*bfloat16.* got .*float32",
    ),
    "NaN scale": (
        lambda p: edit_tensors(p, lambda t: t[f"{EXPERT}.weight_scale"].fill_(float("nan"))),
        f"{EXPERT}.weight_scale: expected finite values",
    ),
    "grid of the wrong dtype": (
        lambda p: edit_tensors(p, lambda t: t.update({f"{EXPERT}.weight_grid": t[f"{EXPERT}.weight_grid"].int()})),
        f"{EXPERT}.weight_grid: expected .*uint8.* got .*int32",
    ),
    "widths that disagree with the codes": (lambda p: edit_bits(p, widen), r"up_proj.weight_packed: expected .* got"),
    "bit map without an expert": (
        lambda p: edit_bits(p, lambda bits: bits.update({MODULE: {n: b[:3] for n, b in bits[MODULE].items()}})),
        f"{MODULE}: expected 4 experts as config.json says, got 3",
    ),
    "bit map with another module": (
        lambda p: edit_bits(p, lambda bits: bits.update({"model.layers.1.mlp": bits.pop(MODULE)})),
        "num_bits.model.layers.1.mlp: expected a module named",
    ),
    "Mixtral's names": (
        lambda p: edit_bits(
            p, lambda b: b.update({MODULE: dict(zip(("w1", "w3", "w2"), b[MODULE].values(), strict=True))})
        ),
        "with gate_proj, up_proj, down_proj, got w1, w3, w2",
    ),
    "newer format": (
        lambda p: edit_config(p, lambda c: c["quantization_config"].update(format_version=99)),
        "got 99: upgrade alphaq-vllm",
    ),
    "another method": (
        lambda p: edit_config(p, lambda c: c["quantization_config"].update(quant_method="awq")),
        "expected 'alphaq', got 'awq'",
    ),
    "not quantized": (
        lambda p: edit_config(p, lambda c: c.pop("quantization_config")),
        "expected an AlphaQ checkpoint, got one that is not quantized: convert it first",
    ),
    "no hidden size": (lambda p: edit_config(p, lambda c: c.pop("hidden_size")), "hidden_size: expected an integer"),
    "group size that does not divide": (
        lambda p: edit_config(p, lambda c: c.update(hidden_size=120)),
        "in_features=120 is not divisible by group_size=64",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_dequantize_refuses_a_checkpoint_that_lies(checkpoint, tmp_path, name):
    damage, message = LIES[name]
    damage(checkpoint)
    with pytest.raises(ValueError, match=message):
        dequantize(str(checkpoint), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_check_alphaq_returns_the_bit_map(converted, tiny_model):
    widths = check_alphaq(open_checkpoint(str(converted("mixtral"))))
    assert {matrix.name: bits for matrix, bits in widths.items()} == bit_map(tiny_model("mixtral"))


def test_dequantize_auto_wants_a_dtype_in_the_config(checkpoint, tmp_path):
    edit_config(checkpoint, lambda config: config.update(torch_dtype=config.pop("dtype")))
    assert dequantize(str(checkpoint), tmp_path / "old")["dtype"] == "bfloat16"
    assert "torch_dtype" not in json.loads((tmp_path / "old" / "config.json").read_bytes())
    edit_config(checkpoint, lambda config: config.pop("torch_dtype"))
    with pytest.raises(ValueError, match="got None: pass `dtype`"):
        dequantize(str(checkpoint), tmp_path / "out")


@pytest.mark.parametrize("as_json", [True, False])
def test_command_says_what_it_did(converted, tmp_path, monkeypatch, capsys, as_json):
    out = tmp_path / "out"
    arguments = [str(converted("qwen2_moe")), str(out), "--dtype", "float32", "--max-shard-size", "1MB"]
    monkeypatch.setattr(sys, "argv", ["dequantize", *arguments, *["--json"] * as_json])
    with pytest.raises(SystemExit) as caught:
        run(command.main)
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert len(list(out.glob("*.safetensors"))) > 1
    if as_json:
        assert json.loads(printed)["size_after"] == size
    else:
        assert f"{out}: 24 expert matrices in float32" in printed


def test_command_reports_errors_in_one_line(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dequantize", str(tiny_model("qwen2_moe")), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        run(command.main)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
