"""One check of a source before anything is written, whatever the settings.

A case is a number of a list of what was reported of programs of this kind. Rows 53 to 56 of the table of bad inputs
are cases 1 to 4.
"""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from alphaq_vllm import convert, measure
from offline.source.checkpoint import CONFIG, SINGLE, open_checkpoint
from tests.conftest import MODEL

WEIGHTS_ONLY = {"noise": "measured", "quantizer": "mse"}
SETTINGS = {
    "default": {},
    "weights only": WEIGHTS_ONLY,
    "uniform": {"mode": "uniform", "bits": 3, "quantizer": "rtn"},
    "linear layers": {**WEIGHTS_ONLY, "linear_bits": 4, "group_size": 32},
    "dry run": {"dry_run": True},
    "dry run of weights only": {**WEIGHTS_ONLY, "dry_run": True},
}
LAYER = "model.layers.1"


@pytest.fixture
def docs_moe(tmp_path):
    """A copy of the embedded model, whose head is its embedding, to be damaged."""
    return shutil.copytree(MODEL, tmp_path / "model")


def edit_tensors(model, edit):
    tensors = load_file(model / SINGLE)
    edit(tensors)
    save_file(tensors, model / SINGLE, {"format": "pt"})


def edit_config(model, **fields):
    config = json.loads((model / CONFIG).read_bytes())
    (model / CONFIG).write_text(json.dumps({**config, **fields}))


def assert_refused(model, message):
    """By every setting with the same words, before anything is written."""
    before = sorted(model.parent.rglob("*"))
    for name, settings in SETTINGS.items():
        with pytest.raises(ValueError, match=message):
            convert(model, model.with_name("out"), **settings)
        assert sorted(model.parent.rglob("*")) == before, name
    with pytest.raises(ValueError, match=message):
        measure(model, model.with_name("stats.csv"))
    assert sorted(model.parent.rglob("*")) == before


NOT_FINITE = {
    "router row": (f"{LAYER}.mlp.gate.weight", (3,), torch.nan, r"got 128 NaN or infinite, the first nan at \[3, 0\]"),
    "embedding row": ("model.embed_tokens.weight", (7,), torch.nan, r"got 128 NaN or .*, the first nan at \[7, 0\]"),
    "shared expert": (
        f"{LAYER}.mlp.shared_expert.down_proj.weight", (5, 9), 3e38,
        r"got 1 so large that float32 overflows, the first 3e\+38 at \[5, 9\]",
    ),
    "bias": (f"{LAYER}.self_attn.k_proj.bias", (2,), -torch.inf, r"got 1 NaN or infinite, the first -inf at \[2\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_FINITE)
def test_case_1_numbers_that_are_not_finite_beside_the_experts_are_refused(docs_moe, name):
    tensor, place, number, message = NOT_FINITE[name]
    edit_tensors(docs_moe, lambda tensors: tensors[tensor].__setitem__(place, number))
    assert_refused(docs_moe, f"{tensor}: expected finite weights, {message}: the source is damaged")


MISSING = (
    "self_attn.o_proj.weight", "self_attn.q_proj.bias", "mlp.gate.weight", "mlp.shared_expert.up_proj.weight",
    "mlp.shared_expert_gate.weight", "input_layernorm.weight",
)  # fmt: skip


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", *(f"{LAYER}.{n}" for n in MISSING)])
def test_case_2_a_source_without_a_tensor_is_refused(docs_moe, name):
    edit_tensors(docs_moe, lambda tensors: tensors.pop(name))
    assert_refused(docs_moe, rf"expected the tensors that config.json implies, got none of {name}: download")


def test_case_2_a_source_without_the_head_that_its_config_unties_is_refused(docs_moe):
    edit_config(docs_moe, tie_word_embeddings=False)
    assert_refused(docs_moe, r"got none of lm_head\.weight: download the source again or correct config\.json")


def test_a_tied_source_may_have_the_head_alone(docs_moe, tmp_path):
    edit_tensors(docs_moe, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    convert(docs_moe, tmp_path / "out", calibration_length=16, calibration_tokens=64, dry_run=True)


NESTED = {"dtype": "torch.bfloat16", "_attn_implementation": "flash_attention_3", "quantization_config": None}
LEFTOVERS = {
    "padding beyond the vocabulary": {"pad_token_id": 10**6},
    "attention of another program": {"_attn_implementation": "flash_attention_2", "attn_implementation": "xformers"},
    "dtype spelled": {"torch_dtype": "torch.bfloat16", "dtype": "torch.bfloat16"},
    "dtypes of no model": {"torch_dtype": "int8", "dtype": "float8_e4m3fn"},
    "dtype null": {"torch_dtype": None, "dtype": None},
    "dtype unknown": {"torch_dtype": "auto", "dtype": "mixed"},
    "null fields": {"rope_scaling": None, "quantization_config": None, "head_dim": None, "layer_types": None,
                    "text_config": None, "architectures": None},
    "nested leftovers": {"extra_config": NESTED},
    "outputs as tuples": {"return_dict": False, "output_hidden_states": True, "output_attentions": True},
    "half of a letter": {"trained_on": ["\ud800", {"\udc00": "\U00010000 \u00fc"}]},
    "code": {"auto_map": {"AutoConfig": "configuration_x.Config"}},
}  # fmt: skip


def converted(source, out, **settings):
    convert(source, out, calibration_length=16, calibration_tokens=64, **settings)
    checkpoint = open_checkpoint(str(out))
    return {name: checkpoint.load(name) for name in checkpoint.tensors}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def plain(tiny_model, tmp_path_factory):
    """The tensors of the tiny Qwen2-MoE's conversion by default."""
    return converted(tiny_model("qwen2_moe"), tmp_path_factory.mktemp("plain") / "out")


@pytest.mark.parametrize("name", LEFTOVERS)
def test_case_3_leftovers_in_a_config_change_nothing(model, tmp_path, plain, name):
    edit_config(model, **LEFTOVERS[name])
    assert_equal(converted(model, tmp_path / "out"), plain)
    # On other spellings of dtypes it fails.
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype in (None, torch.bfloat16)


@pytest.mark.parametrize("fields", [NESTED, {"pad_token_id": 10**6}], ids=["leftovers", "padding"])
def test_case_3_leftovers_in_a_nested_config_change_nothing(tiny_model, tmp_path, fields):
    model = shutil.copytree(tiny_model("qwen3_5_moe"), tmp_path / "model")
    text = json.loads((model / CONFIG).read_bytes())["text_config"]
    edit_config(model, text_config={**text, **fields})
    for source, out in ((model, "out"), (tiny_model("qwen3_5_moe"), "plain")):
        convert(source, tmp_path / out, bits=3)
    edited, plain = (open_checkpoint(str(tmp_path / out)) for out in ("out", "plain"))
    assert_equal(*({name: of.load(name) for name in of.tensors} for of in (edited, plain)))


@pytest.mark.parametrize("vocab_size", [1535, 1537])
def test_case_4_a_vocabulary_that_contradicts_the_rows_is_refused(docs_moe, vocab_size):
    edit_config(docs_moe, vocab_size=vocab_size)
    message = (
        rf"embed_tokens\.weight: expected shape \({vocab_size}, 128\) by vocab_size={vocab_size}, got \(1536, 128\)"
    )
    assert_refused(docs_moe, message)


def test_case_4_a_projection_of_half_the_width_is_refused(docs_moe):
    name = f"{LAYER}.self_attn.o_proj.weight"
    edit_tensors(docs_moe, lambda tensors: tensors.update({name: tensors[name][:, :64].contiguous()}))
    message = rf"{name}: expected shape \(128, 128\) by hidden_size=128, .*, got \(128, 64\): download"
    assert_refused(docs_moe, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"num_hidden_layers": 10**6}, "num_hidden_layers: expected at most one layer for", id="deep"),
        pytest.param({"num_hidden_layers": 4, "layer_types": None}, r"none of model\.layers\.3\.", id="a layer more"),
        pytest.param({"num_experts_per_tok": None}, "num_experts_per_tok: expected a number of experts", id="null"),
        pytest.param({"num_experts_per_tok": 9}, "num_experts_per_tok: .* from 1 to 8, got 9", id="too many"),
        pytest.param({"max_position_embeddings": 0}, "max_position_embeddings: expected a number", id="no place"),
        pytest.param({"hidden_act": "gelux"}, "transformers can build the model, got KeyError: 'gelux'", id="unknown"),
        pytest.param({"norm_topk_prob": "x"}, "transformers can build the model, got Strict", id="another type"),
        pytest.param({"rms_norm_eps": float("nan")}, "an epsilon of norms from 0 up, got nan", id="epsilon nan"),
        pytest.param({"rms_norm_eps": float("inf")}, "an epsilon of norms from 0 up, got inf", id="infinite epsilon"),
        pytest.param({"rms_norm_eps": -1.0}, "an epsilon of norms from 0 up, got -1.0", id="negative epsilon"),
        pytest.param({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "give NaN", id="nan"),
        pytest.param({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "some that give NaN", id="angles"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_used_is_refused(docs_moe, fields, message):
    edit_config(docs_moe, **fields)
    assert_refused(docs_moe, message)


def test_a_config_that_builds_a_model_and_cannot_run_it_is_refused(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model("granitemoe"), tmp_path / "model")
    edit_config(model, residual_multiplier=None)
    assert_refused(model, "expected a config with which transformers can run the model, got TypeError")


def test_predictions_that_are_not_numbers_are_refused_and_leave_nothing(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model("granitemoe"), tmp_path / "model")
    edit_config(model, attention_multiplier=0)
    with pytest.raises(ValueError, match="expected a model that predicts tokens, got NaN"):
        convert(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_whose_layers_give_zeros_is_refused_and_leaves_nothing(model, tmp_path):
    """Nothing tells which of its widths matter."""
    edit_tensors(model, lambda tensors: tensors["model.embed_tokens.weight"].zero_())
    with pytest.raises(ValueError, match=r"got zeros from that of model\.layers\.0\.mlp\.experts: compare its files"):
        convert(model, tmp_path / "out", calibration_length=16, calibration_tokens=64)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    convert(model, tmp_path / "out", **WEIGHTS_ONLY)


def test_what_is_too_many_is_named_and_kept(docs_moe, tmp_path, capsys):
    edit_tensors(docs_moe, lambda tensors: tensors.update({"model.more.weight": torch.full((2,), torch.nan)}))
    summary = convert(docs_moe, tmp_path / "out", **WEIGHTS_ONLY)
    assert "1 tensor that the model does not need, kept as they are: model.more.weight" in str(summary)
    assert "model.more.weight" in open_checkpoint(str(tmp_path / "out")).tensors


@pytest.mark.parametrize("name", ["lm_head.weight_scale", f"{LAYER}.self_attn.o_proj.weight_scale_inv"])
def test_scales_of_weights_that_the_config_does_not_declare_quantized_are_refused(docs_moe, name):
    """Without them the weights would be other numbers, and what is served noise."""
    edit_tensors(docs_moe, lambda tensors: tensors.update({name: torch.ones(1)}))
    assert_refused(docs_moe, f"expected weights alone, .* got parts of quantized ones: {name}: take config.json from")


def test_words_of_transformers_do_not_pass_for_options(docs_moe, alphaq):
    edit_config(docs_moe, rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0})
    status, _, error = alphaq("convert", docs_moe, docs_moe.with_name("out"), "--dry-run")
    assert (status, "keys in 'rope_parameters' for 'rope_type'='yarn'" in error, "--rope" in error) == (2, True, False)


def test_layers_that_only_draft_are_needed_ones(docs_moe, tmp_path):
    """DeepSeek numbers them after the decoder's layers, Qwen calls them mtp."""
    drafts = {"model.layers.3.eh_proj.weight": torch.ones(2, 2), "mtp.norm.weight": torch.ones(2)}
    edit_tensors(docs_moe, lambda tensors: tensors.update(drafts))
    edit_config(docs_moe, num_nextn_predict_layers=1)
    assert "does not need" not in str(convert(docs_moe, tmp_path / "out", **WEIGHTS_ONLY, dry_run=True))
    edit_tensors(docs_moe, lambda tensors: tensors["mtp.norm.weight"].fill_(torch.nan))
    assert_refused(docs_moe, r"mtp\.norm\.weight: expected finite weights")
