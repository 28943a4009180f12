"""The native CPU kernel, as every instruction set that this processor has."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from alphaq_vllm import native_build as build
from alphaq_vllm.kernels import MoEWeights, PackedExperts, fused_moe, prepare_
from alphaq_vllm.kernels.cpu import native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=build.supported())
def instruction_set(request):
    return request.param


def reordered(experts: PackedExperts, instruction_set: str) -> PackedExperts:
    tensors = (tensor.clone() for tensor in experts.tensors)
    return native.repack_(PackedExperts(*tensors, experts.group_size, experts.widths), instruction_set)


@pytest.fixture
def compute(instruction_set):
    """``native.fused_moe`` of weights in the order of the checkpoint."""

    def run(x, weights: MoEWeights, routing, digits: int | None = None) -> torch.Tensor:
        w13, w2 = (reordered(experts, instruction_set) for experts in (weights.w13, weights.w2))
        return native.fused_moe(x, dataclasses.replace(weights, w13=w13, w2=w2), routing, instruction_set, digits)

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(case, dtype, compute, make_problem, assert_close, poisoned_empty):
    problem = make_problem(case, dtype)
    assert_close(compute(*problem.inputs), problem.expected, dtype)


def test_one_byte_to_an_activation_is_an_approximation(compute, default_case, make_problem):
    problem = make_problem(default_case, torch.float32)
    error = (compute(*problem.inputs, digits=1).double() - problem.expected).norm() / problem.expected.norm()
    assert 1e-3 < error < 3e-2


def test_the_environment_asks_for_one_byte(compute, default_case, make_problem, monkeypatch):
    problem = make_problem(default_case, torch.bfloat16)
    expected = compute(*problem.inputs, digits=1)
    monkeypatch.setenv("ALPHAQ_CPU_ACTIVATIONS", "int8")
    assert torch.equal(compute(*problem.inputs), expected)
    monkeypatch.setenv("ALPHAQ_CPU_ACTIVATIONS", "int4")
    with pytest.raises(ValueError, match="ALPHAQ_CPU_ACTIVATIONS: expected one of exact, int8, got int4"):
        compute(*problem.inputs)


@pytest.mark.parametrize("num_tokens", [1, 7, 200])
def test_number_of_threads_changes_no_bit(num_tokens, compute, default_case, make_problem):
    problem = make_problem(dataclasses.replace(default_case, num_tokens=num_tokens), torch.bfloat16)
    outputs = []
    # The fixture one_thread puts the number back.
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        outputs.append(compute(*problem.inputs))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_instruction_sets_agree_on_the_order(instruction_set, make_experts):
    torch.manual_seed(0)
    experts = make_experts([[b, b] for b in range(1, 9)], 48, 128, 64)
    ours, portable = (reordered(experts, name) for name in (instruction_set, build.PORTABLE))
    assert ours.order == "cpu"
    assert all(torch.equal(a, b) for a, b in zip(ours.tensors, portable.tensors, strict=True))


def test_order_keeps_every_bit(instruction_set, make_experts):
    """As many bits of each value as before, so none is lost or doubled."""
    experts = make_experts([[b] for b in range(1, 9)], 32, 64, 32)
    ours = reordered(experts, instruction_set)
    bits = [sum(byte.bit_count() for byte in e.packed.numpy().tobytes()) for e in (experts, ours)]
    assert bits[0] == bits[1]
    assert torch.equal(ours.scales, experts.scales)
    assert torch.equal(ours.grids.flatten().sort().values, experts.grids.flatten().sort().values)


def test_a_token_that_is_not_finite_spoils_no_other(compute, default_case, make_problem):
    problem = make_problem(default_case, torch.float32)
    expected = compute(*problem.inputs)
    for value in (float("nan"), float("inf"), float("-inf")):
        x = problem.x.clone()
        x[1, 3] = value
        out = compute(x, problem.weights, problem.routing)
        assert out[1].isnan().all()
        others = [0, 2, 3, 4]
        assert torch.equal(out[others], expected[others])


def test_largest_and_smallest_activations(compute, default_case, make_problem):
    """The answer to so large ones is not finite, that to so small ones is nothing; nothing else happens."""
    problem = make_problem(default_case, torch.float32)
    assert not compute(problem.x.sign() * 3e38, problem.weights, problem.routing).isfinite().all()
    assert not compute(problem.x * 1e-42, problem.weights, problem.routing).any()


def test_refuses_ids_of_experts_that_the_layer_does_not_have(compute, default_case, make_problem):
    problem = make_problem(default_case, torch.float32)
    ids = problem.routing.topk_ids.clone()
    ids[2, 0] = 4
    with pytest.raises(ValueError, match="topk_ids: expected local ids below 4, got 4"):
        compute(problem.x, problem.weights, dataclasses.replace(problem.routing, topk_ids=ids))


def test_more_tokens_than_one_piece(compute, make_problem, default_case, assert_close, monkeypatch):
    """They are computed in pieces of 128 MiB of activations: here two."""
    case = dataclasses.replace(default_case, num_tokens=9000, hidden_size=32, intermediate_size=1024, num_experts=3)
    problem = make_problem(case, torch.float32)
    out = compute(*problem.inputs)
    few = slice(8000, 8010)
    alone = compute(problem.x[few], problem.weights, problem.routing.of_tokens(few))
    assert torch.equal(out[few], alone)


def test_repack_refuses_what_it_cannot_take(make_experts):
    experts = make_experts([[2, 2]], 32, 64, 32)
    with pytest.raises(ValueError, match="experts: expected the order of the checkpoint, got that of a gpu"):
        native.repack_(dataclasses.replace(experts, order="gpu"))
    with pytest.raises(ValueError, match="experts: expected a multiple of 16 rows, got 40"):
        native.repack_(make_experts([[2, 2]], 40, 64, 32))


def test_the_operator_computes_with_it(default_case, make_problem, assert_close, monkeypatch):
    """``prepare_`` brings experts into its order, and the operator sees that."""
    problem = make_problem(default_case, torch.bfloat16)
    expected = fused_moe(*problem.inputs)
    w13, w2 = prepare_(problem.weights.w13), prepare_(problem.weights.w2)
    assert (w13.order, w2.order) == ("cpu", "cpu")
    calls = []
    computed = native.fused_moe
    monkeypatch.setattr(native, "fused_moe", lambda *args: (calls.append(1), computed(*args))[1])
    weights = dataclasses.replace(problem.weights, w13=w13, w2=w2)
    out = fused_moe(problem.x, weights, problem.routing)
    assert calls == [1]
    assert_close(out, problem.expected, torch.bfloat16)
    assert_close(out, expected.double(), torch.bfloat16)
