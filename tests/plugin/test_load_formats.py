"""``--load-format``: what reads a checkpoint's tensors works, made-up weights too, and the rest is refused by name."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vllm.config import LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.model_loader import default_loader, get_model, runai_streamer_loader
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

from alphaq_vllm import convert
from alphaq_vllm.kernels import Routing, fused_moe
from alphaq_vllm.plugin import config as config_module
from alphaq_vllm.plugin import files
from alphaq_vllm.plugin._compat import AskedWeights, weights_asked_for
from tests.conftest import MODEL
from tests.reliability.loading import load, one_rank, reload, same, state


@pytest.fixture(scope="module", autouse=True)
def rank(tmp_path_factory):
    with one_rank(tmp_path_factory.mktemp("rank")):
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Experts of several widths, and linear layers of 4 bits, not to be changed."""
    out = tmp_path_factory.mktemp("formats") / "checkpoint"
    convert(MODEL, out, bits=3, noise="measured", group_size=64, linear_bits=4, quantizer="mse")
    return out


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return state(load(checkpoint, verify=True))


@pytest.fixture
def without_weights(checkpoint, tmp_path):
    """What people copy to profile a model: all but the weights."""
    return shutil.copytree(checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))


def finite_outputs(model):
    """Whether every layer of experts computes finite numbers."""
    layers = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    assert layers
    for layer in layers:
        moe = layer.moe_config
        x = torch.randn(3, moe.hidden_dim, dtype=moe.in_dtype)
        ids = torch.arange(3 * moe.experts_per_token).view(3, -1).remainder(moe.num_experts).int()
        output = fused_moe(x, layer.quant_method.weights, Routing(torch.ones(ids.shape), ids, None, False))
        if not output.isfinite().all():
            return False
    return True


@pytest.mark.parametrize("load_format", ["hf", "safetensors"])
def test_formats_that_read_safetensors_load_the_same(checkpoint, loaded, load_format):
    assert same(state(load(checkpoint, verify=True, load_format=load_format)), loaded)


@pytest.mark.parametrize(
    ("load_format", "module", "iterator"),
    [
        ("fastsafetensors", default_loader, "fastsafetensors_weights_iterator"),
        ("instanttensor", default_loader, "instanttensor_weights_iterator"),
        ("runai_streamer", runai_streamer_loader, "runai_safetensors_weights_iterator"),
    ],
)
def test_other_readers_go_through_the_same_loading(checkpoint, loaded, monkeypatch, load_format, module, iterator):
    """Without their packages, of which some need a GPU: what they read is read by another here."""

    def read(paths, *arguments, **options):
        return (pair for path in paths for pair in load_file(path).items())

    monkeypatch.setattr(module, iterator, read)
    monkeypatch.setattr(runai_streamer_loader, "list_safetensors", lambda path: [*Path(path).glob("*.safetensors")])
    assert same(state(load(checkpoint, verify=True, load_format=load_format)), loaded)


def test_the_streamer_loads_the_same(checkpoint, loaded):
    pytest.importorskip("runai_model_streamer")
    assert same(state(load(checkpoint, verify=True, load_format="runai_streamer")), loaded)


def test_case_7_dummy_weights_need_no_weights(without_weights, loaded):
    model = load(without_weights, verify=True, load_format="dummy")
    made_up = state(model)
    assert {name: tensor.shape for name, tensor in made_up.items()} == {n: t.shape for n, t in loaded.items()}
    assert finite_outputs(model)


def test_what_replaces_dummy_weights_must_be_whole(checkpoint, loaded):
    """Training starts servers so, and sends them weights later."""
    tensors = {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
    arguments = EngineArgs(str(checkpoint), quantization="alphaq", enforce_eager=True, load_format="dummy")
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        model = get_model(vllm_config=config)
        reload(model, config, tensors)
        assert same(state(model), loaded)
        for name in ("mlp.experts.2.up_proj.weight_scale", "self_attn.q_proj.weight_scale"):
            lacking = {key: tensor for key, tensor in tensors.items() if key != f"model.layers.1.{name}"}
            with pytest.raises(ValueError, match=rf"{name}: expected in the checkpoint, got nothing"):
                reload(model, config, lacking)


def test_a_model_in_full_precision_takes_dummy_weights():
    overrides = {"quantization_config": {"quant_method": "alphaq", "bits": 2.0, "mode": "uniform"}}
    assert finite_outputs(load(MODEL, load_format="dummy", hf_overrides=overrides))


@pytest.mark.parametrize("load_format", ["sharded_state", "runai_streamer_sharded", "ipc_cache"])
@pytest.mark.parametrize("model", ["converted", "in full precision"])
def test_case_7_formats_that_read_back_memory_are_refused_by_name(checkpoint, load_format, model):
    path = checkpoint if model == "converted" else MODEL
    with pytest.raises(ValueError, match=f"--load-format {load_format}: expected a format that reads the tensors of a"):
        load(path, verify=True, load_format=load_format)


def test_case_7_tensorizer_is_refused_by_name(checkpoint):
    """vLLM asks for more arguments first, and for the package."""
    model = ModelConfig(str(checkpoint), quantization="alphaq")
    with pytest.raises(ValueError, match="--load-format tensorizer: expected a format that reads the tensors of a"):
        VllmConfig(model_config=model, load_config=LoadConfig(load_format="tensorizer"))


def test_case_7_what_vllm_saved_as_sharded_state_is_refused_by_name(checkpoint, without_weights):
    """As vLLM's example saves it: weights as a rank holds them, beside the files of the checkpoint."""
    ShardedStateLoader.save_model(load(checkpoint), str(without_weights))
    assert [*without_weights.glob("model-rank-0-part-0.safetensors")]
    with pytest.raises(ValueError, match=r"--load-format sharded_state: .*: serve the checkpoint that convert wrote"):
        load(without_weights, verify=True, load_format="sharded_state")


def test_weights_that_lie_elsewhere_are_not_compared(without_weights, monkeypatch):
    """vLLM brings a model's other files from an object storage, and streams its weights from there."""
    asked = []
    monkeypatch.setattr(files, "check_files", asked.append)
    model = ModelConfig(str(without_weights), quantization="alphaq", model_weights="s3://bucket/model")
    VllmConfig(model_config=model, load_config=LoadConfig(load_format="runai_streamer"))
    assert asked == []
    VllmConfig(model_config=ModelConfig(str(without_weights), quantization="alphaq"), load_config=LoadConfig())
    assert asked == [Path(without_weights)]


def test_the_format_is_known_only_while_vllm_makes_a_config(checkpoint, monkeypatch):
    assert weights_asked_for() == AskedWeights("auto", "")
    seen = []
    monkeypatch.setattr(
        config_module.AlphaQConfig,
        "maybe_update_config",
        lambda self, *arguments, **options: seen.append(weights_asked_for()),
    )
    model = ModelConfig(str(checkpoint), quantization="alphaq")
    VllmConfig.get_quantization_config(model, LoadConfig(load_format="Dummy"))
    assert seen == [AskedWeights("dummy", "")]
