"""What an expert makes of errors in its matrices, against what it makes of them for drawn inputs."""

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from offline.sensitivity.reach import activation_of, reaches

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu2": lambda x: x.relu().square()}


def outputs(weights, inputs, activation):
    *first, down = weights
    gate, *up = (inputs @ weight.T for weight in first)
    return (activation(gate) * up[0] if up else activation(gate)) @ down.T


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "no gate"])
@pytest.mark.parametrize("scale", [0.2, 3.0], ids=["small", "large"])
def test_reaches_are_those_of_gaussian_inputs(gated, activation, scale):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    gate = draw(48, 32) * scale / 32**0.5
    # Rows of the two are alike, as they may be in a model.
    up = 0.6 * gate + draw(48, 32) * scale / 32**0.5
    weights = [*([gate] if gated else []), up, draw(32, 48) / 48**0.5]
    inputs = draw(40_000, 32)
    before = outputs(weights, inputs, activation)
    found = reaches([weight.float() for weight in weights], activation)
    for place, reach in enumerate(found):
        errors = []
        for _ in range(8):
            changed = list(weights)
            changed[place] = weights[place] + 1e-4 * draw(*weights[place].shape)
            errors.append((outputs(changed, inputs, activation) - before).square().sum() / 1e-8)
        expected = (sum(errors) / len(errors) / before.square().sum()).item()
        # Neurons are not as independent as the formula takes them for.
        assert reach == pytest.approx(expected, rel=0.15)


def test_reaches_do_not_depend_on_the_scale_of_down_but_for_its_own():
    torch.manual_seed(0)
    gate, up, down = torch.randn(48, 32), torch.randn(48, 32), torch.randn(32, 48)
    first, second = reaches([gate, up, down], F.silu), reaches([gate, up, 1e3 * down], F.silu)
    assert second == pytest.approx([first[0], first[1], 1e-6 * first[2]])


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_an_expert_without_output_has_no_reach(silent):
    weights = [torch.ones(16, 8), torch.ones(16, 8), torch.ones(8, 16)]
    weights[silent].zero_()
    assert reaches(weights, F.silu) == [0.0, 0.0, 0.0]


def test_reaches_of_large_weights_are_finite():
    weights = [torch.full((16, 8), 1e30), torch.full((16, 8), 1e30), torch.full((8, 16), 1e30)]
    assert all(0 < reach < 1 for reach in reaches(weights, F.silu))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"hidden_act": "silu"}, "silu"),
        ({"text_config": {"hidden_activation": "gelu_pytorch_tanh"}}, "gelu_pytorch_tanh"),
        ({"mlp_hidden_act": "relu2"}, "relu2"),
        ({"hidden_act": "of its own"}, "silu"),
        ({"hidden_act": ["silu"]}, "silu"),
        ({}, "silu"),
    ],
)
def test_activations_are_those_of_the_config(config, name):
    assert type(activation_of(config)) is type(ACT2FN[name])
