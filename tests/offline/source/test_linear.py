from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaq_vllm import convert, dequantize, validate
from alphaq_vllm.format import AlphaQSpec, LinearFormat
from offline.source.alphaq import check_alphaq
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts
from offline.source.linear import LinearLayer, choose_formats, find_head, find_linear_layers
from tests.offline.source.test_families import edit_config

MODEL = Path(__file__).parents[2] / "models" / "docs-moe"
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LATENT = {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
SHARED = {f"shared_expert.{name}" for name in MLP}
SHARED_EXPERTS = {f"shared_experts.{name}" for name in MLP}
# Below self_attn or the MLP in the second, last layer, which is an MoE layer with full attention in all families.
EXPECTED = {
    "mixtral": ATTENTION,
    "qwen2_moe": ATTENTION | SHARED,
    "qwen3_moe": ATTENTION,
    "qwen3_next": ATTENTION | SHARED,
    "qwen3_5_moe": ATTENTION | SHARED,
    "qwen3_5_moe_text": ATTENTION | SHARED,
    "olmoe": ATTENTION,
    "deepseek_v2": LATENT | {"q_proj"} | SHARED_EXPERTS,
    "deepseek_v3": LATENT | {"q_a_proj", "q_b_proj"} | SHARED_EXPERTS,
    "glm4_moe": ATTENTION | SHARED_EXPERTS,
    "phimoe": ATTENTION,
    "minimax_m2": ATTENTION,
    "granitemoe": ATTENTION,
    "granitemoeshared": ATTENTION | {"input_linear", "output_linear"},
    "gpt_oss": ATTENTION,
    "llama4": ATTENTION | SHARED,
    "llama4_text": ATTENTION | SHARED,
    # vLLM builds its attention without names.
    "deepseek": SHARED_EXPERTS,
    "sarvam_mla": LATENT | {"q_proj"} | SHARED_EXPERTS,
    "deepseek_v4": {"wq_a", "wq_b", "wkv", "wo_b"} | {f"shared_experts.{name}" for name in ("w1", "w2", "w3")},
}
BUDGET = {"bits": 3, "noise": "analytic", "quantizer": "mse"}


def found(model):
    source = open_checkpoint(str(model))
    return find_linear_layers(source, find_experts(source))


@pytest.mark.parametrize("model_type", EXPECTED)
def test_find_linear_layers_knows_every_family(tiny_model, model_type):
    names = [layer.name.partition("layers.1.")[2] for layer in found(tiny_model(model_type))]
    assert {name.partition(".")[2] for name in names if name} == EXPECTED[model_type]


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_find_linear_layers_finds_dense_layers(tiny_model, model_type):
    names = {layer.name for layer in found(tiny_model(model_type))}
    assert {name for name in names if ".layers.0.mlp." in name} == {f"model.layers.0.mlp.{name}" for name in MLP}


def test_find_linear_layers_leaves_routers_embeddings_and_unknown_layers_alone(tiny_model):
    names = {layer.name for layer in found(tiny_model("qwen2_moe"))}
    assert not any(
        part in name for name in names for part in ("mlp.gate", "shared_expert_gate", "embed", "head", "norm")
    )


def test_find_linear_layers_refuses_a_model_without_any(model):
    tensors = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "_attn" not in name and "shared_expert." not in name}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"expected linear layers .* got none: use `linear_bits=16`"):
        found(model)


def test_choose_formats_takes_the_greatest_group_size_that_divides():
    layers = [LinearLayer(f"m.layers.0.mlp.{name}", (64, size)) for name, size in (("a", 256), ("b", 192), ("c", 96))]
    assert list(choose_formats(layers, 4, 128).values()) == [LinearFormat(4, g) for g in (128, 64, 32)]
    assert list(choose_formats(layers, 8, 32).values()) == [LinearFormat(8, 32)] * 3


def test_choose_formats_leaves_groups_whole_that_ranks_can_share():
    layers = [LinearLayer(f"m.layers.0.self_attn.{name}", (256, 256)) for name in ("q_proj", "o_proj")]
    assert [f.group_size for f in choose_formats(layers, 4, 128, tp_size=8).values()] == [128, 128]


@pytest.mark.parametrize(
    ("layers", "tp_size", "message"),
    [
        ([LinearLayer("m.o_proj", (64, 80))], 1, r"m\.o_proj: in_features=80 is not divisible by any"),
        (
            [LinearLayer("m.o_proj", (64, 64))],
            4,
            r"m\.o_proj: in_features=64 over `tp_size=4` ranks is 16 each, .* of \[1, 2\]",
        ),
        (
            [LinearLayer("m.q_proj", (64, 64)), LinearLayer("m.k_proj", (64, 128))],
            1,
            "vLLM makes one layer of these, expected the same in_features",
        ),
    ],
)
def test_choose_formats_refuses(layers, tp_size, message):
    with pytest.raises(ValueError, match=message):
        choose_formats(layers, 4, 128, tp_size)


HEADS = {
    "mixtral": "lm_head",
    "llama4": "language_model.lm_head",
    "qwen3_vl_moe": "lm_head",
}


@pytest.mark.parametrize("model_type", HEADS)
def test_find_head_knows_where_families_have_it(tiny_model, model_type):
    source = open_checkpoint(str(tiny_model(model_type)))
    head = find_head(source, find_experts(source))
    assert head == LinearLayer(HEADS[model_type], source.spec(f"{HEADS[model_type]}.weight").shape)


def test_find_head_refuses_embeddings_in_its_place():
    source = open_checkpoint(str(MODEL))
    with pytest.raises(ValueError, match=r"docs-moe: expected a head of its own, such as lm_head\.weight, got none"):
        find_head(source, find_experts(source))


def test_find_head_refuses_a_copy_of_the_embeddings(model):
    edit_config(model, tie_word_embeddings=True)
    source = open_checkpoint(str(model))
    with pytest.raises(ValueError, match="expected a head of its own"):
        find_head(source, find_experts(source))


def test_find_head_refuses_families_whose_head_vllm_does_not_quantize(tiny_model):
    source = open_checkpoint(str(tiny_model("gpt_oss")))
    with pytest.raises(ValueError, match="vLLM loads the head of gpt_oss in full precision alone: use `head_bits=16`"):
        find_head(source, find_experts(source))


def test_convert_quantizes_the_head_alone(tiny_model, tmp_path):
    model, out, plain = tiny_model("qwen2_moe"), tmp_path / "out", tmp_path / "plain"
    summary = convert(model, out, **BUDGET, head_bits=8)
    result = open_checkpoint(str(out))
    assert AlphaQSpec.from_dict(result.config["quantization_config"]).linear == {"lm_head": LinearFormat(8, 128)}
    assert (summary.linear_layers, summary.linear_bits, summary.head_bits) == (0, 16, 8)
    assert "head:           8 bits" in str(summary)
    assert (
        "- everything but the experts of 2 layers, and the head at 8 bits, is unchanged"
        in (out / "README.md").read_text()
    )
    assert "lm_head.weight" not in result.tensors
    validate(str(out), str(model))
    dequantize(str(out), plain)
    weight = open_checkpoint(str(model)).load("lm_head.weight").float()
    restored = open_checkpoint(str(plain)).load("lm_head.weight").float()
    assert (restored - weight).square().sum() < 1e-4 * weight.square().sum()


@pytest.fixture(scope="module", params=[4, 8])
def converted(request, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear")
    summary = convert(tiny_model("qwen2_moe"), folder / "out", **BUDGET, linear_bits=request.param)
    return folder / "out", tiny_model("qwen2_moe"), request.param, summary


def test_convert_quantizes_linear_layers_and_leaves_the_rest_alone(converted):
    out, model, linear_bits, summary = converted
    source, result = open_checkpoint(str(model)), open_checkpoint(str(out))
    spec = AlphaQSpec.from_dict(result.config["quantization_config"])
    layers = found(model)
    assert spec.linear == {layer.name: LinearFormat(linear_bits, 128) for layer in layers}
    assert (summary.linear_layers, summary.linear_bits) == (len(layers), linear_bits)
    assert f"{len(layers)} at {linear_bits} bits" in str(summary)
    for layer in layers:
        assert layer.tensor not in result.tensors
        assert result.spec(f"{layer.name}.weight_packed").shape == (layer.shape[0], layer.shape[1] * linear_bits // 32)
    copied = [name for name in source.tensors if "experts." not in name and name not in {la.tensor for la in layers}]
    assert {"model.layers.0.mlp.gate.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.weight"} <= set(copied)
    assert all(torch.equal(source.load(name), result.load(name)) for name in copied)


def test_dequantize_restores_linear_layers(converted, tmp_path):
    out, model, linear_bits, _ = converted
    dequantize(str(out), tmp_path / "plain")
    source, result = open_checkpoint(str(model)), open_checkpoint(str(tmp_path / "plain"))
    assert source.tensors.keys() == result.tensors.keys()
    for layer in found(model):
        weight, restored = source.load(layer.tensor).float(), result.load(layer.tensor)
        assert restored.dtype == torch.bfloat16
        relative = (restored.float() - weight).square().sum() / weight.square().sum()
        assert relative < {4: 0.02, 8: 1e-4}[linear_bits]


def test_convert_at_16_bits_leaves_linear_layers_alone(tiny_model, tmp_path):
    convert(tiny_model("qwen2_moe"), tmp_path / "out", **BUDGET)
    assert "linear" not in open_checkpoint(str(tmp_path / "out")).config["quantization_config"]


def test_convert_names_a_layer_with_nan(model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj\.weight: expected finite weights, got 1 NaN"):
        convert(model, tmp_path / "out", **BUDGET, linear_bits=4)
    assert not (tmp_path / "out").exists()


def test_validate_accepts_linear_layers_and_compares_them_with_the_source(converted):
    out, model, _, summary = converted
    assert validate(str(out), str(model))["linear_layers"] == summary.linear_layers


NAME = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{NAME}.weight_packed"), rf"{NAME}\.weight_packed: expected a matrix"),
        (lambda tensors: tensors.pop(f"{NAME}.weight_scale"), rf"expected all tensors .*{NAME}\.weight_scale"),
        (
            lambda tensors: tensors.update({f"{NAME}.weight": torch.zeros(128, 128)}),
            rf"{NAME}\.weight: expected only the quantized layer",
        ),
        (lambda tensors: tensors[f"{NAME}.weight_scale"].fill_(torch.inf), rf"{NAME}\.weight_scale: expected finite"),
        (
            lambda tensors: tensors.update({f"{NAME}.weight_scale": torch.zeros(128, 2).bfloat16()}),
            rf"{NAME}\.weight_scale: expected",
        ),
        (
            lambda tensors: tensors.update({f"{NAME}.weight_packed": torch.zeros(128, 15, dtype=torch.int32)}),
            rf"{NAME}\.weight_packed: expected whole groups",
        ),
    ],
    ids=["no-codes", "no-scale", "weight-too", "infinite", "wrong-scale", "odd-codes"],
)
def test_check_alphaq_refuses_damaged_linear_layers(converted, tmp_path, change, message):
    checkpoint = changed(converted[0], tmp_path, change)
    with pytest.raises(ValueError, match=message):
        check_alphaq(open_checkpoint(str(checkpoint)))


def test_validate_refuses_a_linear_layer_of_another_model(converted, tmp_path):
    out, model, *_ = converted
    tensors = load_file(model / "model.safetensors")
    tensors[f"{NAME}.weight"] = torch.randn_like(tensors[f"{NAME}.weight"])
    other = tmp_path / "model"
    other.mkdir()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_text((model / "config.json").read_text())
    with pytest.raises(ValueError, match=rf"{NAME}: expected a mean squared error of at most"):
        validate(str(out), str(other))


def changed(checkpoint, folder, change):
    """The checkpoint's config and tensors, these changed by ``change(tensors)``."""
    tensors = {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
    change(tensors)
    copy = folder / "changed"
    copy.mkdir()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    (copy / "config.json").write_text((checkpoint / "config.json").read_text())
    return copy
