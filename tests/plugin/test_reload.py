"""Weights loaded again into a model that serves: parameters keep their places, their loaders and their values."""

import pytest
import torch
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.model_loader import get_model

from alphaq_vllm import convert
from alphaq_vllm.plugin.moe import AlphaQMoEMethod
from tests.conftest import MODEL
from tests.plugin.layers import HIDDEN, TOP_K, build, load, run, stored_tensors
from tests.reliability.loading import one_rank, reload, same, state


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Experts of several widths, and linear layers of 4 bits."""
    folder = tmp_path_factory.mktemp("quantized") / "checkpoint"
    convert(
        MODEL,
        folder,
        bits=3,
        noise="measured",
        group_size=64,
        linear_bits=4,
        quantizer="mse",
    )
    return folder


def test_reloading_restores_every_parameter_in_place(quantized, tmp_path, monkeypatch):
    put_together = AlphaQMoEMethod._put_together

    def check_tables(method, layer):
        for stem in method.shapes:
            assert getattr(layer, f"{stem}_num_bits").tolist() == method.local_bits[stem]
            assert getattr(layer, f"{stem}_offsets").tolist() == method.offsets[stem]
        return put_together(method, layer)

    monkeypatch.setattr(AlphaQMoEMethod, "_put_together", check_tables)
    tensors = {name: t for file in quantized.glob("*.safetensors") for name, t in load_file(file).items()}
    with one_rank(tmp_path):
        arguments = EngineArgs(str(quantized), quantization="alphaq", enforce_eager=True, max_model_len=128)
        config = arguments.create_engine_config()
        with set_current_vllm_config(config):
            model = get_model(vllm_config=config)
            before, parameters = state(model), dict(model.named_parameters())
            places = {name: parameter.data_ptr() for name, parameter in parameters.items()}
            for _ in range(2):
                for parameter in parameters.values():
                    parameter.data.zero_()
                reload(model, config, tensors)
                assert same(state(model), before)
                parameters = dict(model.named_parameters())
                assert {name: parameter.data_ptr() for name, parameter in parameters.items()} == places
                layers = [module for module in model.modules() if isinstance(module, RoutedExperts)]
                assert layers
                for layer in layers:
                    assert layer.quant_method.weights.w13.packed is layer.w13_weight_packed
            # A reload that lacks a tensor is refused as a load is.
            del tensors["model.layers.1.mlp.experts.2.up_proj.weight_scale"]
            with pytest.raises(ValueError, match=r"experts\.2\.up_proj\.weight_scale: expected in the checkpoint"):
                reload(model, config, tensors)


class Caller(torch.nn.Module):
    """A layer of routed experts within a module that may be called with other parameters."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *arguments):
        return run(self.layer, *arguments)


def test_layer_computes_with_the_parameters_that_it_is_called_with():
    """vLLM calls layers so if it offloads weights and the GPU cannot read the host's memory."""
    caller = Caller(load(build(4), stored_tensors(4)))
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(5, 4, generator=generator).argsort(1)[:, :TOP_K].int()
    routed = torch.randn(5, HIDDEN, generator=generator), torch.rand(5, TOP_K, generator=generator), ids
    others = caller.state_dict()
    others["layer.w2_weight_scale"] = 2 * others["layer.w2_weight_scale"]
    before = caller(*routed)
    assert before.any()
    assert torch.equal(torch.func.functional_call(caller, others, routed), 2 * before)
    assert torch.equal(caller(*routed), before)
