"""Weights loaded again into a model that serves: parameters keep their places, their loaders and their values."""

import pytest
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model

from alphaq_vllm import convert
from alphaq_vllm.plugin.support import has_cpu_int4_kernel
from tests.conftest import MODEL
from tests.reliability.loading import one_rank, reload, same, state


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Experts of several widths, and linear layers of 4 bits where vLLM has a kernel for them."""
    folder = tmp_path_factory.mktemp("quantized") / "checkpoint"
    convert(
        MODEL,
        folder,
        bits=3,
        noise="measured",
        group_size=64,
        linear_bits=4 if has_cpu_int4_kernel() else 16,
        quantizer="mse",
    )
    return folder


def test_reloading_restores_every_parameter_in_place(quantized, tmp_path):
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
            # A reload that lacks a tensor is refused as a load is.
            del tensors["model.layers.1.mlp.experts.2.up_proj.weight_scale"]
            with pytest.raises(ValueError, match=r"experts\.2\.up_proj\.weight_scale: expected in the checkpoint"):
                reload(model, config, tensors)
