"""Which family a checkpoint is of: unknown types by the names of their experts, and what a user is told otherwise."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaq_vllm import convert, dequantize, validate
from offline.source.architectures import FAMILIES
from offline.source.checkpoint import SINGLE, open_checkpoint
from offline.source.families import find_experts
from offline.source.recognition import draft_tensors, family_of, taken_for
from offline.source.unsupported import REASONS
from tests.offline.test_sources import assert_only_experts_change

QUICK = {"bits": 3, "noise": "analytic", "quantizer": "mse"}


def edit(path, rename=lambda name: name, **changes):
    """Change a copy's config and the names of its tensors."""
    config = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    tensors = {rename(name): tensor for name, tensor in load_file(path / SINGLE).items()}
    save_file(tensors, path / SINGLE)
    return path


@pytest.fixture
def copy(tiny_model, tmp_path):
    return lambda model_type: shutil.copytree(tiny_model(model_type), tmp_path / "model")


@pytest.mark.parametrize(
    ("model_type", "like"), [("olmoe", "qwen2_moe"), ("mixtral", "mixtral"), ("lfm2_moe", "lfm2_moe")]
)
def test_an_unknown_type_is_converted_like_a_known_one_and_the_summary_says_so(copy, tmp_path, model_type, like):
    path = edit(copy(model_type), model_type="new_moe")
    summary = convert(path, tmp_path / "out", **QUICK)
    assert summary.family == "new_moe"
    assert f"model_type 'new_moe' is not in the table of families: read like {like}, by the names" in str(summary)
    assert "only the experts were checked to be complete" in str(summary)
    assert_only_experts_change(path, tmp_path / "out")
    assert validate(tmp_path / "out", source=path)["matrices"] == summary.matrices
    dequantize(str(tmp_path / "out"), tmp_path / "plain")
    assert set(open_checkpoint(str(tmp_path / "plain")).tensors) == set(load_file(path / SINGLE))


def test_an_unknown_type_is_read_from_fused_tensors_of_either_orientation(copy):
    path = edit(copy("granitemoe_swa"), model_type="new_moe")
    plain = find_experts(open_checkpoint(str(path))).matrices
    tensors = {
        name: tensor.transpose(1, 2).contiguous() if tensor.ndim == 3 else tensor
        for name, tensor in load_file(path / SINGLE).items()
    }
    save_file(tensors, path / SINGLE)
    turned = find_experts(open_checkpoint(str(path))).matrices
    assert [(m.name, m.shape) for m in turned] == [(m.name, m.shape) for m in plain]
    assert all(m.fused.layout.transposed for m in turned)


def test_the_user_can_name_a_family(copy, tmp_path):
    path = edit(copy("olmoe"), model_type="dbrx")
    with pytest.raises(ValueError, match="model_type 'dbrx' is not supported: its experts lie in"):
        convert(path, tmp_path / "out", **QUICK)
    summary = convert(path, tmp_path / "out", **QUICK, family="olmoe")
    assert "read like olmoe, as `family` says" in summary.found


def test_a_family_that_the_user_named_is_known_of_what_was_converted(copy, tmp_path, alphaq):
    path, out = edit(copy("granitemoe_swa"), model_type="dbrx"), tmp_path / "out"
    convert(path, out, **QUICK, family="granitemoe_swa", exclude=("*.layers.1.*",))
    assert validate(out, source=path)["matrices"] == 12
    assert alphaq("inspect", out)[0] == 0
    dequantize(out, tmp_path / "plain")
    # Of families whose single matrices have the same names, that one decides where they lie in fused tensors.
    assert set(open_checkpoint(str(tmp_path / "plain")).tensors) == set(load_file(path / SINGLE))


def test_the_record_of_a_family_that_is_none_is_refused(copy, tmp_path):
    out = tmp_path / "out"
    convert(copy("olmoe"), out, **QUICK)
    for family, message in (
        (3, r"quantization_config\.family: expected a type of model, got 3"),
        ("x", "`family`: .* 'x'"),
    ):
        config = json.loads((out / "config.json").read_bytes())
        config["quantization_config"]["family"] = family
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            dequantize(out, tmp_path / "plain")


def test_a_family_that_the_user_names_is_one_of_the_table(copy, tmp_path):
    with pytest.raises(ValueError, match=r"`family`: expected one of mixtral, .*, got 'nothing'"):
        convert(copy("olmoe"), tmp_path / "out", **QUICK, family="nothing")


def test_the_command_takes_a_family(copy, tmp_path, alphaq):
    path = edit(copy("olmoe"), model_type="new_moe")
    arguments = ("--bits", "3", "--noise", "analytic", "--quantizer", "mse", "--family", "flex_olmo")
    status, printed, _ = alphaq("convert", path, tmp_path / "out", *arguments)
    assert status == 0
    assert "read like flex_olmo" in printed
    assert alphaq("measure", path, "-o", tmp_path / "stats.csv", "--noise", "analytic", "--family", "mixtral")[0] == 2


@pytest.mark.parametrize(
    ("model_type", "prefix"),
    [("qwen3_5_moe_text", "model.language_model."), ("gemma4_text", "model.language_model.")],
)
def test_a_text_model_is_read_under_the_names_of_the_model_that_also_sees(copy, tmp_path, model_type, prefix):
    own = copy(model_type)
    names = [matrix.name for matrix in find_experts(open_checkpoint(str(own))).matrices]
    path = edit(own, lambda name: name.replace("model.", prefix, 1) if name.startswith("model.") else name)
    source = open_checkpoint(str(path))
    assert [m.name for m in find_experts(source).matrices] == [n.replace("model.", prefix, 1) for n in names]
    assert taken_for(source) == ""
    assert convert(path, tmp_path / "out", **QUICK).found == ""
    assert_only_experts_change(path, tmp_path / "out")
    assert validate(tmp_path / "out", source=path)["matrices"] == len(names)


WRAPPED = {
    "_orig_mod.": "begin with _orig_mod., which torch.compile puts there: save the model that is wrapped",
    "base_model.model.": "begin with base_model.model., which PEFT puts there",
    "language_model.": r"expected names of layers that begin with model.layers., as vLLM loads olmoe, got language",
}


@pytest.mark.parametrize("prefix", WRAPPED)
@pytest.mark.parametrize("model_type", ["olmoe", "new_moe"])
def test_names_that_vllm_would_not_load_are_named(copy, prefix, model_type):
    path = edit(copy("olmoe"), lambda name: prefix + name, model_type=model_type)
    if (prefix, model_type) == ("language_model.", "new_moe"):
        assert family_of(open_checkpoint(str(path))).prefix == "language_model.model."
        return
    with pytest.raises(ValueError, match=WRAPPED[prefix]):
        find_experts(open_checkpoint(str(path)))


UNKNOWN = {
    "fused of a kind of its own": (
        {"model.layers.3.moe.fc1.weight": torch.zeros(4, 8, 8)},
        {},
        r"got 'new', an unknown Mixture-of-Experts model, whose experts are named like model\.layers\.3\.moe\.fc1",
    ),
    "of an unknown projection": (
        {"model.layers.3.mlp.experts.0.linear_v.weight": torch.zeros(8, 8)},
        {},
        r"the nearest family is \w+, with model\.layers\.0\.mlp\.experts.*; name one with `family` if the names agree",
    ),
    "by its config alone": ({"a": torch.zeros(1)}, {"num_experts": 8}, "an unknown Mixture-of-Experts model: the near"),
    "dense": ({"model.layers.0.mlp.gate_proj.weight": torch.zeros(8, 8)}, {}, "'new' is a dense model"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_model_is_told_from_a_dense_one(tmp_path, name):
    tensors, config, message = UNKNOWN[name]
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "new", **config}))
    with pytest.raises(ValueError, match=message):
        find_experts(open_checkpoint(str(tmp_path)))


@pytest.mark.parametrize("model_type", REASONS)
def test_a_model_that_cannot_be_converted_is_refused_with_the_reason(tmp_path, model_type):
    save_file({"model.layers.0.mlp.experts.0.gate_proj.weight": torch.zeros(8, 8)}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError) as refused:
        find_experts(open_checkpoint(str(tmp_path)))
    assert str(refused.value).endswith(f"model_type {model_type!r} is not supported: {REASONS[model_type]}")


def test_a_dense_model_of_a_family_with_experts_is_told_so(copy):
    path = copy("gemma4_text")
    tensors = {n: t for n, t in load_file(path / SINGLE).items() if ".experts." not in n}
    save_file(tensors, path / SINGLE)
    edit(path, num_experts=None)
    with pytest.raises(ValueError, match=r"expected tensors such as model\.layers\.0\.experts\.gate_up_proj, got none"):
        find_experts(open_checkpoint(str(path)))


def test_consolidated_files_are_named(copy):
    path = copy("mixtral")
    (path / SINGLE).rename(path / "consolidated.safetensors")
    with pytest.raises(FileNotFoundError, match=r"got only consolidated\.safetensors: Mistral's own files"):
        open_checkpoint(str(path))


def test_every_family_is_found_by_its_own_example(tmp_path):
    for family in FAMILIES.values():
        save_file({family.example: torch.zeros(2, 2)}, tmp_path / SINGLE)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "new"}))
        assert family_of(open_checkpoint(str(tmp_path))).block == family.block


COUNTS = {"moe_num_experts": 4, "n_routed_experts": 4}


@pytest.mark.parametrize("key", COUNTS)
def test_the_number_of_experts_has_many_keys(copy, key):
    path = edit(copy("olmoe"), num_experts=None, **{key: COUNTS[key]})
    assert find_experts(open_checkpoint(str(path))).num_experts == 4


@pytest.mark.parametrize("name", ["mtp.fc.weight", "model.mtp.layers.0.enorm.weight", "model.mtp_block.0.norm.weight"])
def test_what_only_drafts_is_told_by_its_name(copy, name):
    path = copy("olmoe")
    save_file({**load_file(path / SINGLE), name: torch.ones(8)}, path / SINGLE)
    assert draft_tensors(open_checkpoint(str(path))) == {name}


def test_the_number_of_experts_may_be_a_list_of_one_number(copy):
    path = edit(copy("hunyuan_v1_moe"), num_experts=[4, 4])
    assert find_experts(open_checkpoint(str(path))).num_experts == 4
    edit(path, num_experts=[4, 8])
    with pytest.raises(ValueError, match=r"num_experts: expected a number of experts from 1 up, got \[4, 8\]"):
        find_experts(open_checkpoint(str(path)))
