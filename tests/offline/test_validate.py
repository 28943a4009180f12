"""Validation: a flipped byte anywhere is found, and so is a checkpoint that is whole but not of its source."""

import fnmatch
import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaq_vllm import convert, validate
from alphaq_vllm.checksums import SUMS, check_sums, render_sums, sums_size
from alphaq_vllm.format import GRID, PACKED, SCALE
from offline.operations.compare import greatest_mse
from offline.quantizers.quantize import quantize
from offline.source.alphaq import check_alphaq
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts
from tests.conftest import MODEL

SHARD = "model-00001-of-00001.safetensors"
EXPERT = "model.layers.1.mlp.experts.2.up_proj"


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """A conversion of a tiny Qwen2-MoE with a tokenizer and a card, not to be changed."""
    path = tmp_path_factory.mktemp("whole")
    source = shutil.copytree(tiny_model("qwen2_moe"), path / "source")
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    convert(source, path / "checkpoint", bits=3.0, noise="measured", quantizer="mse")
    return path


@pytest.fixture
def checkpoint(whole, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(whole / "checkpoint", tmp_path / "checkpoint")


def sum_again(checkpoint):
    (checkpoint / SUMS).write_text(render_sums(checkpoint))


def edit_tensors(checkpoint, edit):
    """Change tensors such that the checksums do not tell."""
    tensors = load_file(checkpoint / SHARD)
    edit(tensors)
    save_file(tensors, checkpoint / SHARD, {"format": "pt"})
    index = json.loads((checkpoint / "model.safetensors.index.json").read_bytes())
    index["weight_map"] = dict.fromkeys(tensors, SHARD)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    sum_again(checkpoint)


def test_validate_accepts_what_convert_writes(alphaq, whole):
    status, out, _ = alphaq("validate", whole / "checkpoint", "--source", whole / "source")
    assert status == 0
    assert "ok: 7 files, " in out
    assert "24 expert matrices" in out
    assert "4 bits: " in out
    assert "everything else is equal to the source" in out


def test_validate_prints_json(alphaq, whole):
    status, out, _ = alphaq("validate", whole / "checkpoint", "--source", whole / "source", "--json")
    result = json.loads(out)
    assert status == 0
    assert result["files"] == len(list((whole / "checkpoint").iterdir())) - 1
    assert sum(error["matrices"] for error in result["errors"].values()) == result["matrices"] == 24
    assert 0.05 < result["errors"]["2"]["relative_mse"] < 0.2
    assert 0.004 < result["errors"]["4"]["relative_mse"] < 0.015


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        SUMS,
        "alphaq_stats.csv",
        "config.json",
        "generation_config.json",
        SHARD,
        "model.safetensors.index.json",
        "tokenizer.json",
    ],
)
def test_validate_finds_any_flipped_bit(checkpoint, name):
    path = checkpoint / name
    content = path.read_bytes()
    assert {file.name for file in checkpoint.iterdir()} == {
        *(line.split("  ")[1] for line in (checkpoint / SUMS).read_text().splitlines()),
        SUMS,
    }
    places = sorted({round(i * (len(content) - 1) / 12) for i in range(13)})
    for number, place in enumerate(places):
        flipped = bytearray(content)
        # Every bit in turn: bit 5 turns a hexadecimal digit into the same one in upper case.
        flipped[place] ^= 1 << (number * 5 + 5) % 8
        path.write_bytes(flipped)
        with pytest.raises((ValueError, OSError)):
            validate(str(checkpoint))
    path.write_bytes(content)
    validate(str(checkpoint))


def test_command_says_what_is_damaged_and_fails(alphaq, checkpoint):
    content = bytearray((checkpoint / SHARD).read_bytes())
    content[-1] ^= 1
    (checkpoint / SHARD).write_bytes(content)
    status, _, error = alphaq("validate", checkpoint)
    assert status == 2
    assert f"expected the contents that SHA256SUMS states, got others in {SHARD}" in error


def test_validate_wants_every_file_and_its_sum(checkpoint):
    lines = (checkpoint / SUMS).read_text().splitlines(keepends=True)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected all files of SHA256SUMS, got no tokenizer\.json"):
        validate(str(checkpoint))
    (checkpoint / SUMS).write_text("".join(line for line in lines if SHARD not in line and "token" not in line))
    with pytest.raises(ValueError, match=f"expected a sum for every file of the checkpoint, got none for {SHARD}"):
        validate(str(checkpoint))
    (checkpoint / SUMS).unlink()
    with pytest.raises(FileNotFoundError, match="expected the checksums that convert writes, got none"):
        validate(str(checkpoint))


def test_validate_leaves_added_files_alone(checkpoint):
    (checkpoint / ".gitattributes").write_text("*.safetensors filter=lfs")
    validate(str(checkpoint))


@pytest.mark.parametrize("content", ["", "\n", "abc  file\n", "{sum}  ../file\n", "{sum} *file\n", "{sum}  file"])
def test_check_sums_refuses_what_is_malformed(tmp_path, content):
    (tmp_path / SUMS).write_text(content.format(sum="0" * 64))
    with pytest.raises(ValueError, match="expected lines of a SHA-256 sum and a file name"):
        check_sums(tmp_path)


def test_sums_are_as_long_as_planned_and_as_sha256sum_writes_them(tmp_path):
    for name in ("a", "ü.json"):
        (tmp_path / name).write_text("x")
    text = render_sums(tmp_path)
    assert len(text.encode()) == sums_size(["a", "ü.json"])
    assert text.startswith("2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881  a\n")


def test_validate_finds_what_is_not_finite_anywhere(checkpoint):
    edit_tensors(checkpoint, lambda tensors: tensors["model.norm.weight"].__setitem__(3, torch.nan))
    with pytest.raises(ValueError, match=r"model\.norm\.weight: expected finite values"):
        validate(str(checkpoint))


def test_validate_downloads_all_that_was_written(whole, tmp_path, monkeypatch):
    def snapshot_download(name, revision, allow_patterns, ignore_patterns):
        (tmp_path / "hub").mkdir()
        for file in (whole / "checkpoint").iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, tmp_path / "hub")
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert validate("owner/model")["files"] == 7
    assert len(list((tmp_path / "hub").iterdir())) == 8


def test_validate_refuses_an_ordinary_model(alphaq, tiny_model):
    status, _, error = alphaq("validate", tiny_model("qwen2_moe"))
    assert status == 2
    assert "SHA256SUMS: expected the checksums that convert writes" in error


def swap_experts(tensors):
    for suffix in (PACKED, SCALE, GRID):
        one, other = f"{EXPERT}.{suffix}", f"{EXPERT.replace('.2.', '.3.')}.{suffix}"
        if tensors[one].shape == tensors[other].shape:
            tensors[one], tensors[other] = tensors[other], tensors[one]


def negate(tensors):
    tensors[f"{EXPERT}.{SCALE}"] *= -1


def shift(tensors):
    tensors[f"{EXPERT}.{GRID}"] += 1


@pytest.mark.parametrize("edit", [negate, shift, swap_experts])
def test_validate_finds_values_that_are_not_the_sources(tiny_model, tmp_path, edit):
    out = tmp_path / "out"
    convert(tiny_model("qwen2_moe"), out, bits=4.0, mode="uniform", quantizer="mse")
    edit_tensors(out, edit)
    validate(str(out))
    with pytest.raises(ValueError, match=r"mlp\.experts\.\d\.up_proj: expected a mean squared error of at most"):
        validate(str(out), str(tiny_model("qwen2_moe")))


def test_validate_finds_other_tensors_that_are_not_the_sources(whole, checkpoint):
    edit_tensors(checkpoint, lambda tensors: tensors["model.norm.weight"].add_(0.01))
    with pytest.raises(ValueError, match=r"model\.norm\.weight: expected the source's values bit for bit"):
        validate(str(checkpoint), str(whole / "source"))


def test_validate_finds_tensors_that_the_source_lacks(whole, checkpoint):
    edit_tensors(checkpoint, lambda tensors: tensors.update({"model.more.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"got a difference in model\.more\.weight"):
        validate(str(checkpoint), str(whole / "source"))


def test_validate_finds_a_config_that_is_not_the_sources(whole, checkpoint):
    config = json.loads((checkpoint / "config.json").read_bytes())
    (checkpoint / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    sum_again(checkpoint)
    with pytest.raises(ValueError, match=r"config\.json: expected the source's with the bit map, got .* rms_norm_eps"):
        validate(str(checkpoint), str(whole / "source"))


def test_validate_refuses_another_family_as_the_source(checkpoint, tiny_model):
    with pytest.raises(ValueError, match="is it the source"):
        validate(str(checkpoint), str(tiny_model("mixtral")))


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v2"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_validate_accepts_every_width_and_group_size(tiny_model, tmp_path, model_type, group_size):
    source = str(tiny_model(model_type))
    matrices = find_experts(open_checkpoint(source)).matrices
    bits = {matrix.name: 1 + i % 8 for i, matrix in enumerate(matrices)}
    convert(source, tmp_path / "out", bit_map=bits, group_size=group_size, max_shard_size=100_000, quantizer="mse")
    assert len(validate(str(tmp_path / "out"), source)["errors"]) == 8


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A conversion of docs-moe by gptq, whose down matrices are fitted to what others of few bits give them."""
    out = tmp_path_factory.mktemp("fitted") / "out"
    convert(MODEL, out, bits=4.5, candidate_bits=(2, 8), calibration_tokens=1024)
    return out


def test_validate_accepts_down_that_is_fitted_to_quantized_gate_and_up(fitted):
    assert sorted(validate(str(fitted), str(MODEL))["errors"]) == [2, 8]


def test_validate_finds_down_of_another_expert(fitted, tmp_path):
    out = shutil.copytree(fitted, tmp_path / "out")
    widths = check_alphaq(open_checkpoint(str(out)))
    down = [matrix.name for matrix, num_bits in widths.items() if matrix.name.endswith("down_proj") and num_bits == 2]

    def swap(tensors):
        for suffix in (PACKED, SCALE, GRID):
            first, second = (f"{name}.{suffix}" for name in down[:2])
            tensors[first], tensors[second] = tensors[second], tensors[first]

    edit_tensors(out, swap)
    with pytest.raises(ValueError, match=r"down_proj: expected a mean squared error of at most .* at 2 bits, got"):
        validate(str(out), str(MODEL))


def test_validate_accepts_what_was_excluded(tiny_model, tmp_path):
    out = tmp_path / "out"
    convert(tiny_model("mixtral"), out, bits=3.0, noise="measured", exclude=("*.layers.1.*",), quantizer="mse")
    assert validate(str(out), str(tiny_model("mixtral")))["matrices"] == 12


@pytest.mark.parametrize("num_bits", range(1, 9))
@pytest.mark.parametrize("heavy", [False, True])
def test_greatest_mse_allows_the_quantizer_and_not_two_bits_less(num_bits, heavy):
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(4.0).sample((32, 256)) if heavy else torch.randn(32, 256)
    allowed = greatest_mse(weight, num_bits, 128)
    assert quantize(weight, num_bits, 128).mse < allowed
    assert allowed <= weight.square().mean() * 1.001
    if num_bits > 2:
        assert quantize(weight, num_bits - 2, 128).mse > allowed


@pytest.mark.parametrize("value", [0.0, 0.1, 3.0])
def test_greatest_mse_of_a_constant_matrix_allows_rounding(value):
    weight = torch.full((4, 128), value)
    assert quantize(weight, 2, 128).mse <= greatest_mse(weight, 2, 128) <= value**2 / 10


def test_validate_finds_an_incomplete_model_without_its_source(checkpoint):
    edit_tensors(checkpoint, lambda tensors: tensors.pop("model.layers.1.self_attn.o_proj.weight"))
    with pytest.raises(
        ValueError, match=r"config\.json implies, got none of model\.layers\.1\.self_attn\.o_proj\.weig"
    ):
        validate(str(checkpoint))


def test_validate_finds_shapes_that_contradict_the_config(checkpoint):
    edit_tensors(checkpoint, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)}))
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight: expected shape \(128,\) by .*hidden_size=128.*got \(64,\)"
    ):
        validate(str(checkpoint))


def test_validate_names_what_is_too_many(alphaq, checkpoint):
    edit_tensors(checkpoint, lambda tensors: tensors.update({"model.more.weight": torch.ones(2)}))
    status, out, _ = alphaq("validate", checkpoint)
    assert status == 0
    assert "1 tensor that the model does not need, kept as they are: model.more.weight" in out


def test_validate_finds_excluded_experts_that_are_missing(tiny_model, tmp_path):
    out = tmp_path / "out"
    convert(tiny_model("qwen2_moe"), out, bits=3, noise="measured", exclude=("*.layers.1.*",), quantizer="mse")
    edit_tensors(out, lambda tensors: tensors.pop(f"{EXPERT}.weight"))
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp: expected 4 experts .* got none of experts\.2\.up_proj\.weig"
    ):
        validate(str(out))
    edit_tensors(out, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1.mlp.experts" in name])
    with pytest.raises(ValueError, match=r"config\.json implies, got none of model\.layers\.1\.mlp\.experts: download"):
        validate(str(out))


def test_validate_accepts_experts_of_layers_that_only_draft(tiny_model, tmp_path):
    source = shutil.copytree(tiny_model("qwen2_moe"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.mlp.experts.0.up_proj.weight"] = torch.ones(128, 128)
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_bytes())
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    convert(source, tmp_path / "out", bits=3, noise="measured", quantizer="mse")
    assert validate(str(tmp_path / "out"), str(source))["found"] == ""
