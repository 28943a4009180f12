"""How errors in a matrix arrive at the output of its layer, against what transformers computes with and without."""

from pathlib import Path

import pytest
import torch
import transformers

from alphaq_vllm import packing
from offline.allocation.costs import noise
from offline.model.formula import Formula
from offline.quantizers.quantize import quantize
from offline.sensitivity import propagation
from offline.sensitivity.matrices import MatrixStats
from offline.sensitivity.propagation import FLOOR, error_gains, expert_gains
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts, load_weight
from tests.offline.model.whole import whole_model

DOCS_MOE = Path(__file__).parents[2] / "models" / "docs-moe"


@pytest.fixture(scope="module")
def text():
    return torch.randint(1, 1536, (4, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def gains(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(propagation, "write_text", lambda *_: text)
        source = open_checkpoint(str(DOCS_MOE))
        return error_gains(source, find_experts(source), 128)


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_error_gains_are_those_of_the_whole_model(gains, text, projection):
    model = transformers.AutoModelForCausalLM.from_pretrained(DOCS_MOE, dtype=torch.float32).eval()
    outputs = []
    model.model.layers[1].register_forward_hook(lambda *call: outputs.append(call[2].double()))
    experts = model.model.layers[1].mlp.experts
    weight = experts.down_proj[2] if projection == "down_proj" else experts.gate_up_proj[2]
    if projection != "down_proj":
        weight = weight.chunk(2)[projection == "up_proj"]
    quantized = quantize(weight, 4, 128, "rtn")
    with torch.no_grad():
        model(text, use_cache=False)
        weight.copy_(packing.dequantize(quantized.packed, quantized.scale, quantized.grid, 4))
        model(text, use_cache=False)
    exact, changed = outputs
    expected = ((changed - exact).square().sum() / exact.square().sum()).item() / quantized.mse
    assert gains[f"model.layers.1.mlp.experts.2.{projection}"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text"])
def test_error_gains_account_for_biases_gates_and_weights_on_inputs(tiny_model, monkeypatch, model_type):
    words = torch.randint(3, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(propagation, "write_text", lambda *_: words)
    path, outputs = tiny_model(model_type), []
    source, model = open_checkpoint(str(path)), whole_model(path)
    experts = find_experts(source)
    gains = error_gains(source, experts, 128)
    last = model.model.layers[-1]
    last.register_forward_hook(lambda *call: outputs.append(call[2].double()))
    with torch.no_grad():
        model(words, use_cache=False)
    for matrix in [m for m in experts.matrices if m.module == experts.modules[-1] and m.expert == 2]:
        stored = last.get_parameter(f"{matrix.module.split('.')[-2]}.{matrix.fused.tensor.split('.', 4)[4]}")
        weight = matrix.fused.view(stored.detach()[matrix.expert])
        before, quantized = weight.clone(), quantize(weight, 4, 128, "rtn")
        weight.copy_(packing.dequantize(quantized.packed, quantized.scale, quantized.grid, 4))
        with torch.no_grad():
            model(words, use_cache=False)
        weight.copy_(before)
        exact, changed = outputs[0], outputs[-1]
        expected = ((changed - exact).square().sum() / exact.square().sum()).item() / quantized.mse
        assert gains[matrix.name] == pytest.approx(expected, rel=0.01)


def test_expert_gains_without_a_gate_are_those_behind_the_projection_from_latents(latent_model):
    source = open_checkpoint(str(latent_model))
    up, down = expert = find_experts(source).matrices[:2]
    generator = torch.Generator().manual_seed(0)
    inputs, topk_weights = torch.randn(20, 64, generator=generator), torch.rand(20, generator=generator)
    back = source.load("backbone.layers.0.mixer.fc2_latent_proj.weight").float()
    gains = expert_gains(source, expert, inputs, topk_weights, Formula(lambda x: x.relu() ** 2), 64, back)
    weights = {matrix: load_weight(source, matrix) for matrix in expert}

    def outputs(weights):
        return (inputs @ weights[up].T).relu() ** 2 @ weights[down].T * topk_weights[:, None]

    for matrix, gain in zip(expert, gains, strict=True):
        quantized = quantize(weights[matrix], 4, 64, "rtn")
        changed = packing.dequantize(quantized.packed, quantized.scale, quantized.grid, 4)
        error = ((outputs({**weights, matrix: changed}) - outputs(weights)) @ back.T).square().sum().item()
        assert gain == pytest.approx(error / quantized.mse, rel=1e-3)


def test_an_expert_that_no_token_reaches_still_counts(monkeypatch):
    monkeypatch.setattr(propagation, "write_text", lambda *_: torch.tensor([[5, 6]]))
    source = open_checkpoint(str(DOCS_MOE))
    gains = error_gains(source, find_experts(source), 128)
    layer = [gain for name, gain in gains.items() if ".layers.0." in name]
    # Two tokens reach four of the eight experts at most.
    assert sum(gain == min(layer) for gain in layer) >= 12
    assert min(layer) == pytest.approx(FLOOR * sum(layer) / len(layer), rel=0.2)


def test_propagated_noise_is_the_measured_noise_times_the_gain_of_a_weight():
    stats = [
        MatrixStats("a", 3.0, 2.0, 3.0, 64, {2: 0.1, 4: 0.01}, 8.0),
        MatrixStats("b", 3.0, 1.0, 3.0, 32, {2: 0.3, 4: 0.02}, 1),
    ]
    assert noise(stats, [2, 4], "propagated").tolist() == [[0.1 / 8, 0.01 / 8], [0.3 / 32, 0.02 / 32]]
