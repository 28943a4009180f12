"""How experts compute: formulas against transformers' own modules, with weights that reach every limit."""

import pickle

import pytest
import torch
import transformers
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from offline.model.formula import formula_of, is_known
from offline.model.layer import _answer, _unsorted
from offline.source.architectures import FAMILIES
from offline.source.fused import FusedPart

EXPERTS, TOKENS, FEATURES, INNER = 4, 30, 32, 48
SIZES = {"hidden_size": FEATURES, "num_experts_per_tok": 2}
KINDS = {
    "gpt_oss": (GptOssExperts, {"num_local_experts": EXPERTS, "intermediate_size": INNER}),
    "llama4_text": (Llama4TextExperts, {"num_local_experts": EXPERTS, "intermediate_size": INNER}),
    "nemotron_h": (NemotronHExperts, {"n_routed_experts": EXPERTS, "moe_intermediate_size": INNER}),
    "qwen2_moe": (Qwen2MoeExperts, {"num_experts": EXPERTS, "moe_intermediate_size": INNER}),
}


class HalvedExperts(GptOssExperts):
    """gpt-oss's, if gate and up came one after the other."""

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return GptOssExperts._apply_gate(self, torch.stack((gate, up), -1).flatten(-2))


def make(model_type):
    kind, options = KINDS[model_type]
    config = transformers.AutoConfig.for_model(model_type, **SIZES, **options)
    config._experts_implementation = "eager"
    module = kind(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return module


def matrices(module, family, expert):
    """Gate, up and down of an expert, or up and down, as the family's layout has them."""
    first = module.gate_up_proj if family.gated else module.up_proj
    halves = (0, 1) if family.gated else (None,)
    return [
        *(FusedPart("", family.fused, half).view(first[expert].detach()) for half in halves),
        FusedPart("", family.fused, None).view(module.down_proj[expert].detach()),
    ]


def outputs(formula, weights, inputs, ids, topk_weights):
    """The weighted sum of what experts make of their tokens."""
    summed = torch.zeros_like(inputs)
    for expert, (*first, down) in enumerate(weights):
        tokens, slots = torch.where(ids == expert)
        own = pickle.loads(pickle.dumps(formula.of(expert)))
        inner = own.inner(inputs[tokens], first)
        summed.index_add_(0, tokens, own.project(inner, down, topk_weights[tokens, slots]))
    return summed


def routed(k):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(TOKENS, FEATURES, generator=generator)
    topk_weights, ids = torch.randn(TOKENS, EXPERTS, generator=generator).sigmoid().topk(k)
    return inputs, ids, topk_weights


@pytest.mark.parametrize("model_type", KINDS)
@torch.no_grad()
def test_formulas_compute_what_the_modules_of_transformers_compute(model_type):
    module, family = make(model_type), FAMILIES[model_type]
    weights = [matrices(module, family, expert) for expert in range(EXPERTS)]
    if model_type == "llama4_text":
        inputs, ids, topk_weights = routed(1)
        scaled = torch.zeros(EXPERTS, TOKENS, FEATURES)
        scaled[ids[:, 0], torch.arange(TOKENS)] = inputs * topk_weights
        expected = module(scaled.flatten(0, 1)).view(EXPERTS, TOKENS, FEATURES).sum(0)
        inputs, (found, topk_weights) = _unsorted(scaled.flatten(0, 1), TOKENS)
        assert torch.equal(found, ids)
    else:
        inputs, ids, topk_weights = routed(2)
        expected = module(inputs, ids, topk_weights)
    assert is_known(module)
    computed = outputs(formula_of(module), weights, inputs, ids, topk_weights)
    torch.testing.assert_close(computed, expected, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_limits_of_gpt_oss_are_reached():
    module = make("gpt_oss")
    gate, up, _ = matrices(module, FAMILIES["gpt_oss"], 0)
    inputs = routed(2)[0]
    assert (inputs @ gate.T > module.limit).any()
    assert (inputs @ up.T < -module.limit).any()


def test_how_gate_and_up_lie_is_found():
    module = make("gpt_oss")
    states = list(torch.randn(2, TOKENS, INNER))
    formula = formula_of(module)
    assert (formula.joint, formula.interleaved) == (True, True)
    module.__class__ = HalvedExperts
    halved = formula_of(module)
    assert (halved.joint, halved.interleaved) == (True, False)
    torch.testing.assert_close(halved.activate(states), formula.activate(states))
    assert torch.equal(halved.biases[1], module.gate_up_proj_bias[:, INNER:])
    assert torch.equal(formula.biases[1], module.gate_up_proj_bias[:, 1::2])


def test_formulas_take_no_weights_to_other_processes():
    formula = formula_of(make("gpt_oss"))
    assert len(pickle.dumps(formula.of(0))) < 4096
    assert len(pickle.dumps(formula_of(make("qwen2_moe")).of(0))) < 1024


@pytest.mark.parametrize("change", ["an argument more", "a parameter more", "no activation"])
def test_experts_that_compute_otherwise_are_not_known(change):
    module = make("qwen2_moe")
    if change == "an argument more":
        module.__class__ = type("Other", (Qwen2MoeExperts,), {"forward": lambda self, x, ids, weights, more: x})
    elif change == "a parameter more":
        module.other = torch.nn.Parameter(torch.zeros(1))
    else:
        del module.act_fn
    assert not is_known(module)


def test_outputs_stand_for_those_of_the_first_expert_where_inputs_are_sorted():
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(5, FEATURES, generator=generator)
    answer = _answer(given, torch.ones(EXPERTS * 5, FEATURES)).view(EXPERTS, 5, FEATURES)
    assert torch.equal(answer.sum(0), given)
    assert torch.equal(_answer(given, torch.ones(1, 5, FEATURES))[0], given)
