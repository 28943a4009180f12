"""Checkpoints that lie, loaded as `vllm serve` loads them: refused with a sentence that names the tensor or the key."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.platforms import current_platform

from alphaq_vllm.plugin.config import AlphaQConfig
from alphaq_vllm.plugin.cpu_linear import NativeLinear
from offline.source.checkpoint import CONFIG, INDEX
from tests.reliability.loading import load, one_rank

MODULE = "model.layers.0.mlp.experts"
EXPERT = f"{MODULE}.1.up_proj"
LINEAR = "model.layers.0.self_attn.k_proj"


@pytest.fixture(scope="module")
def rank(tmp_path_factory):
    with one_rank(tmp_path_factory.mktemp("rank")):
        yield


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def edit_tensors(path, edit):
    """Change the tensors, and the index with them."""
    (shard,) = path.glob("*.safetensors")
    tensors = load_file(shard)
    edit(tensors)
    save_file(tensors, shard, {"format": "pt"})
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard.name)}))


def edit_quantization(path, edit):
    config = json.loads((path / CONFIG).read_bytes())
    edit(config["quantization_config"])
    (path / CONFIG).write_text(json.dumps(config))


def set_bits(path, projection, digits):
    edit_quantization(path, lambda q: q["num_bits"][MODULE].update({projection: digits}))


def all_projections(digits):
    return {name: digits for name in ("gate_proj", "up_proj", "down_proj")}


LIES = {
    "bit map lacks an expert": (
        lambda p: edit_quantization(p, lambda q: q["num_bits"].update({MODULE: all_projections("3")})),
        f"{MODULE}: the model has 2 experts, the bit map 1",
    ),
    "bit map adds an expert": (
        lambda p: edit_quantization(p, lambda q: q["num_bits"].update({MODULE: all_projections("345")})),
        f"{MODULE}: the model has 2 experts, the bit map 3",
    ),
    "bit map has another name for the experts": (
        lambda p: edit_quantization(p, lambda q: q["num_bits"].update({f"{MODULE}.x": q["num_bits"].pop(MODULE)})),
        f"{MODULE}.x: vLLM calls these experts {MODULE}, which the bit map does not have",
    ),
    "width that disagrees with the codes": (
        lambda p: set_bits(p, "up_proj", "48"),
        rf"{EXPERT}\.weight_packed: expected torch.int32 of shape \(64, 16\) for 8 bits, got .*\(64, 14\)",
    ),
    "newer format": (
        lambda p: edit_quantization(p, lambda q: q.update(format_version=2)),
        "reads up to 1, got 2: upgrade alphaq-vllm",
    ),
    "unknown key": (lambda p: edit_quantization(p, lambda q: q.update(symmetric=True)), r"unknown \['symmetric'\]"),
    "scale missing": (
        lambda p: edit_tensors(p, lambda t: t.pop(f"{EXPERT}.weight_scale")),
        rf"{EXPERT}\.weight_scale: expected in the checkpoint, got nothing \(1 tensors are missing",
    ),
    "expert missing": (
        lambda p: edit_tensors(p, lambda t: [t.pop(name) for name in list(t) if f"{MODULE}.1." in name]),
        rf"{MODULE}\.1\.down_proj\.weight_grid: expected in the checkpoint, got nothing \(9 tensors are missing",
    ),
    "NaN scale": (
        lambda p: edit_tensors(p, lambda t: t[f"{EXPERT}.weight_scale"][7].fill_(torch.nan)),
        rf"{EXPERT}\.weight_scale: expected finite values",
    ),
    "grid of another dtype": (
        lambda p: edit_tensors(p, lambda t: t.update({f"{EXPERT}.weight_grid": t[f"{EXPERT}.weight_grid"].int()})),
        rf"{EXPERT}\.weight_grid: expected torch.uint8 of shape \(64, 2\) .* got torch.int32",
    ),
    "part of a scale": (
        lambda p: edit_tensors(p, lambda t: t.update({f"{EXPERT}.weight_scale": t[f"{EXPERT}.weight_scale"][:32]})),
        rf"{EXPERT}\.weight_scale: expected torch.bfloat16 of shape \(64, 1\) .* got .*\(32, 1\)",
    ),
    "scale of another dtype": (
        lambda p: edit_tensors(p, lambda t: t.update({f"{EXPERT}.weight_scale": t[f"{EXPERT}.weight_scale"].float()})),
        rf"{EXPERT}\.weight_scale: expected torch.bfloat16 .* got torch.float32",
    ),
    "linear scale missing": (
        lambda p: edit_tensors(p, lambda t: t.pop(f"{LINEAR}.weight_scale")),
        rf"{LINEAR}\.weight_scale: expected in the checkpoint, got nothing",
    ),
    "NaN in a linear scale": (
        lambda p: edit_tensors(p, lambda t: t[f"{LINEAR}.weight_scale"][7].fill_(torch.nan)),
        rf"{LINEAR}\.weight_scale: expected finite values",
    ),
    "fused projections that disagree": (
        lambda p: edit_quantization(p, lambda q: q["linear"][0]["modules"].remove(LINEAR)),
        "self_attn.qkv_proj: vLLM fuses .*k_proj.* so they must be stored alike",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_loading_refuses_a_checkpoint_that_lies(rank, copy, name):
    damage, message = LIES[name]
    damage(copy)
    with pytest.raises(ValueError, match=message):
        load(copy)


def test_loading_accepts_what_was_not_damaged(rank, copy):
    edit_tensors(copy, lambda tensors: None)
    load(copy)


def test_loading_misses_any_tensor_when_vllm_tracks_weights(rank, copy):
    """What is not quantized is vLLM's to check, which it does for quantized models only when it is told to."""
    track = {"model_loader_extra_config": {"enable_weights_track": True}}
    load(copy, **track)
    edit_tensors(copy, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"not initialized from checkpoint: .*model\.norm\.weight"):
        load(copy, **track)


def test_loading_refuses_a_gpu_that_is_too_old(rank, copy, monkeypatch):
    turing = SimpleNamespace(to_int=lambda: 75)
    monkeypatch.setattr(type(current_platform), "get_device_capability", lambda *arguments: turing)
    with pytest.raises(ValueError, match=r"alphaq is not supported for the current GPU. Minimum capability: 80"):
        load(copy)


def test_loading_refuses_a_dtype_that_its_kernels_lack(rank, copy, monkeypatch):
    # vLLM's kernel, as on a machine without a compiler; that of this project takes float32.
    monkeypatch.setattr(NativeLinear, "takes", lambda rows: False)
    with pytest.raises(ValueError, match=r"expected bfloat16 or float16 activations .* got torch.float32: serve with"):
        load(copy, dtype="float32")


def test_loading_refuses_expert_load_balancing_where_vllm_has_none(rank, copy):
    if torch.cuda.is_available():
        pytest.skip("vLLM balances experts on GPUs")
    with pytest.raises(ValueError, match="load balancing is only supported on CUDA"):
        load(copy, enable_eplb=True, enable_expert_parallel=True)


def test_loading_runs_no_code_from_a_checkpoint(rank, copy, tmp_path):
    mark = tmp_path / "executed"
    config = json.loads((copy / CONFIG).read_bytes())
    config["auto_map"] = {name: f"hostile.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    (copy / CONFIG).write_text(json.dumps(config))
    (copy / "hostile.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    # vLLM has classes of its own for the model, so there is nothing to refuse.
    load(copy)
    assert not mark.exists()


NAMES = ["a b", "q's\"d", "$HOME", "a*b?", "a\\b", "[", "模" * 85]


@pytest.mark.parametrize("name", NAMES)
def test_case_13_directories_of_odd_names_are_loaded(tiny_checkpoint, tmp_path, rank, name):
    load(shutil.copytree(tiny_checkpoint, tmp_path / name), verify=True)


@pytest.mark.parametrize("name", ["out[1]", "[ab]/out"])
def test_case_13_a_directory_that_vllm_would_not_open_is_refused(tiny_checkpoint, tmp_path, rank, name, monkeypatch):
    path = shutil.copytree(tiny_checkpoint, tmp_path / name)
    with pytest.raises(ValueError, match="expected a path that is not a pattern, as which vLLM reads it"):
        load(path)
    # Without the check, vLLM does not find the weights: if that changes, the check can go.
    monkeypatch.setattr("alphaq_vllm.paths.check_path", lambda directory: None)
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        load(path)


def test_case_13_a_model_in_full_precision_that_vllm_would_not_open_is_refused(tiny_source, tmp_path):
    path = shutil.copytree(tiny_source, tmp_path / "full[1]")
    with pytest.raises(ValueError, match="expected a path that is not a pattern, as which vLLM reads it"):
        AlphaQConfig().maybe_update_config(str(path))
