"""Every family as transformers itself writes it, and every way in which experts lie in files: the values are right."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from alphaq_vllm import convert, dequantize, validate
from alphaq_vllm.format import GRID, PACKED, SCALE, SHARD_IDS
from offline.source.architectures import FAMILIES, experts_size
from offline.source.checkpoint import SINGLE, open_checkpoint
from offline.source.families import find_experts, load_matrix
from tests.offline.conftest import STEP
from tests.offline.model.whole import whole_model
from tests.offline.quantizers.samples import assert_rounded_to_8_bits


def run_expert(experts, expert, x):
    """One expert's output for ``x``, computed by the model's own module of experts."""
    if type(experts).__name__ == "Llama4TextExperts":
        return experts(x.repeat(experts.num_experts, 1)).view(-1, *x.shape)[expert]
    indices = torch.full((len(x), 1), expert)
    return experts(x, indices, torch.ones(len(x), 1))


def activate(model_type, source, matrices, products):
    """What the projections' outputs become before down_proj, after the papers and model cards."""
    if len(products) == 1:
        return F.relu(products[0]) ** 2
    gate, up = products
    if model_type.startswith("gemma4"):
        return F.gelu(gate, approximate="tanh") * up
    if model_type.startswith("step3p"):
        limit = STEP["swiglu_limits"][1]
        return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
    if model_type == "minimax_m3_vl":
        return swiglu_oai(gate, up)
    if model_type != "gpt_oss":
        return F.silu(gate) * up
    bias = source.load(f"{matrices[0].module}.gate_up_proj_bias")[matrices[0].expert].float()
    return swiglu_oai(gate + bias[0::2], up + bias[1::2])


def swiglu_oai(gate, up):
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@torch.no_grad()
def assert_experts_are_the_models(path):
    """Each expert that is found in the checkpoint computes what transformers computes with it."""
    source, model = open_checkpoint(str(path)), whole_model(path)
    experts = find_experts(source)
    modules = [module for name, module in model.named_modules() if name.endswith(".experts")]
    assert len(modules) == len(experts.modules) > 0
    family = FAMILIES[experts.model_type]
    assert len(experts.matrices) == len(modules) * 4 * len(family.projections)
    torch.manual_seed(1)
    x = torch.randn(3, experts_size(source.config))
    for layer, module in zip(experts.modules, modules, strict=True):
        for expert in range(4):
            matrices = [m for m in experts.matrices if (m.module, m.expert) == (layer, expert)]
            *first, down = (load_matrix(source, matrix) for matrix in matrices)
            assert [m.shape for m in matrices] == [tuple(weight.shape) for weight in (*first, down)]
            output = activate(experts.model_type, source, matrices, [x @ weight.T for weight in first]) @ down.T
            if experts.model_type == "gpt_oss":
                output += source.load(f"{layer}.down_proj_bias")[expert].float()
            torch.testing.assert_close(output, run_expert(module, expert, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_load_matrix_reads_the_experts_of_every_family(tiny_model, model_type):
    assert_experts_are_the_models(tiny_model(model_type))


def assert_only_experts_change(path, converted):
    """All other tensors have the values of the source, and each matrix the name that vLLM looks for."""
    source, output = open_checkpoint(str(path)), open_checkpoint(str(converted))
    experts = find_experts(source)
    replaced = {matrix.tensor for matrix in experts.matrices}
    stored = {f"{matrix.name}.{suffix}" for matrix in experts.matrices for suffix in (PACKED, SCALE, GRID)}
    assert set(output.tensors) == set(source.tensors) - replaced | stored
    for name in set(source.tensors) - replaced:
        assert torch.equal(output.load(name), source.load(name)), name
    return experts


def assert_dequantized(path, dequantized):
    """The same tensors as in the source, and in the experts' the same matrices but for 8-bit rounding."""
    source, output = open_checkpoint(str(path)), open_checkpoint(str(dequantized))
    assert {n: output.spec(n).shape for n in output.tensors} == {n: source.spec(n).shape for n in source.tensors}
    matrices = find_experts(output).matrices
    assert matrices == find_experts(source).matrices
    for matrix in matrices:
        assert_rounded_to_8_bits(load_matrix(output, matrix), load_matrix(source, matrix))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_convert_changes_nothing_but_the_experts_of_every_family(tiny_model, tmp_path, model_type):
    path = tiny_model(model_type)
    bits = {matrix.name: 8 for matrix in find_experts(open_checkpoint(str(path))).matrices}
    convert(path, tmp_path / "alphaq", bit_map=bits, quantizer="mse")
    experts = assert_only_experts_change(path, tmp_path / "alphaq")
    assert {matrix.projection for matrix in experts.matrices} <= set(SHARD_IDS)
    dequantize(str(tmp_path / "alphaq"), tmp_path / "dequantized")
    assert_dequantized(path, tmp_path / "dequantized")


def test_convert_takes_experts_without_a_gate_between_latent_projections(latent_model, tmp_path):
    """Their features are fewer than the model's, and their 192 intermediate ones are three groups of 64."""
    assert_experts_are_the_models(latent_model)
    matrices = find_experts(open_checkpoint(str(latent_model))).matrices
    bits = {matrix.name: 8 for matrix in matrices}
    summary = convert(latent_model, tmp_path / "alphaq", bit_map=bits, group_size=64, quantizer="mse")
    assert summary.matrices == 2 * 4 * 2
    experts = assert_only_experts_change(latent_model, tmp_path / "alphaq")
    assert {matrix.shape for matrix in experts.matrices} == {(192, 64), (64, 192)}
    num_bits = json.loads((tmp_path / "alphaq/config.json").read_bytes())["quantization_config"]["num_bits"]
    widths = {"up_proj": "8888", "down_proj": "8888"}
    assert num_bits == {f"backbone.layers.{layer}.mixer.experts": widths for layer in (0, 3)}
    assert validate(tmp_path / "alphaq", latent_model)["matrices"] == 16
    dequantize(str(tmp_path / "alphaq"), tmp_path / "dequantized")
    assert_dequantized(latent_model, tmp_path / "dequantized")


def test_convert_refuses_experts_that_take_no_latents(latent_model, tmp_path):
    path = shutil.copytree(latent_model, tmp_path / "model")
    config = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps({**config, "moe_latent_size": 32}))
    with pytest.raises(ValueError, match=r"experts.0.up_proj: expected moe_latent_size=32 as one side, got shape"):
        convert(path, tmp_path / "alphaq", bits=3, noise="measured", group_size=64, quantizer="mse")


def test_convert_takes_gateless_experts_in_fused_tensors(latent_model, tmp_path):
    """As transformers holds them in memory."""
    path = shutil.copytree(latent_model, tmp_path / "model")
    tensors = load_file(path / SINGLE)
    for layer, projection in ((layer, projection) for layer in (0, 3) for projection in ("up_proj", "down_proj")):
        name = f"backbone.layers.{layer}.mixer.experts"
        parts = [tensors.pop(f"{name}.{expert}.{projection}.weight") for expert in range(4)]
        tensors[f"{name}.{projection}"] = torch.stack(parts)
    save_file(tensors, path / SINGLE, {"format": "pt"})
    options = {"bits": 3, "noise": "measured", "group_size": 64, "quantizer": "mse"}
    for source, out in ((path, "fused"), (latent_model, "individual")):
        convert(source, tmp_path / out, **options)
    fused, individual = (open_checkpoint(str(tmp_path / out)) for out in ("fused", "individual"))
    assert set(fused.tensors) == set(individual.tensors)
    assert all(torch.equal(fused.load(name), individual.load(name)) for name in fused.tensors)


DEGENERATE = {
    "all zero": torch.zeros(128, 128),
    "constant": torch.full((128, 128), 0.5),
    "rank 1": torch.arange(1.0, 129.0)[:, None] / 128 * torch.linspace(-1, 1, 128),
    "one weight": torch.zeros(128, 128).index_put_((torch.tensor(3), torch.tensor(5)), torch.tensor(1.0)),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_convert_takes_degenerate_experts(model, tmp_path, name):
    tensors, matrix = load_file(model / SINGLE), "model.layers.0.mlp.experts.1.gate_proj"
    tensors[f"{matrix}.weight"] = DEGENERATE[name].bfloat16()
    save_file(tensors, model / SINGLE)
    summary = convert(model, tmp_path / "alphaq", bits=3.5, noise="measured", quantizer="mse")
    assert 3.45 < summary.bits <= 3.5
    dequantize(str(tmp_path / "alphaq"), tmp_path / "dequantized", dtype="float32")
    error = open_checkpoint(str(tmp_path / "dequantized")).load(f"{matrix}.weight") - DEGENERATE[name]
    assert error.abs().max() <= (0 if name == "all zero" else 0.35)


def test_convert_takes_experts_smaller_than_a_block_of_farms(tmp_path):
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_experts=2, num_experts_per_tok=1, pad_token_id=0,
    )  # fmt: skip
    transformers.OlmoeForCausalLM(config).save_pretrained(tmp_path)
    summary = convert(tmp_path, tmp_path.with_name("alphaq"), bits=3, noise="measured", group_size=32, quantizer="mse")
    assert summary.matrices == 6 and summary.bits == 3


def test_convert_names_the_expert_of_a_fused_tensor_that_is_not_finite(tiny_model, tmp_path):
    path = shutil.copytree(tiny_model("granitemoe"), tmp_path / "model")
    tensors = load_file(path / SINGLE)
    tensors["model.layers.1.block_sparse_moe.input_linear.weight"][2, 300, 7] = torch.nan
    save_file(tensors, path / SINGLE)
    message = r"layers\.1\.block_sparse_moe\.experts\.2\.up_proj\.weight: expected finite weights, got 1 NaN"
    with pytest.raises(ValueError, match=message):
        convert(path, tmp_path / "alphaq", noise="measured", quantizer="mse")
    assert not (tmp_path / "alphaq").exists()
