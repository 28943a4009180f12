"""The grid of layers and routings on which every path of ``fused_moe`` is compared with the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from alphaq_vllm.kernels import SILU, Gate, MoEWeights, PackedExperts, Routing, repack_
from alphaq_vllm.packing import pack
from tests.kernels.reference import fused_moe_reference

# In units of the dtype's eps. bfloat16 on CPU also rounds the weights, as any other program that serves them would;
# float32 has only the order of its additions to show.
MAX_ERROR = {torch.float32: 16, torch.bfloat16: 2.5, torch.float16: 1.5}
RMS_ERROR = {torch.float32: 6, torch.bfloat16: 1.25, torch.float16: 0.75}
# For many routes the Triton path rounds gate and up to the dtype as well.
RMS_ERROR_MANY_ROUTES = {torch.bfloat16: 2, torch.float16: 0.75}
ALL_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Case:
    """One layer with its tokens. Widths are dealt out in turn, matrix by matrix, so gate and up differ."""

    name: str
    num_tokens: int = 5
    top_k: int = 2
    num_experts: int = 4
    hidden_size: int = 96
    intermediate_size: int = 160
    group_size: int = 32
    widths: tuple[int, ...] = (2, 3, 4)
    gate: Gate = SILU
    has_gate: bool = True
    has_bias: bool = False
    apply_router_weight_on_input: bool = False
    routing: str = "random"
    ids_dtype: torch.dtype = torch.int32
    # Of those that a grid can have.
    zero_points: tuple[float, float] = (0.2, 0.8)
    # How many times smaller than usual weights are, and how many times larger x.
    shrink: int = 1


CASES = [
    *(Case(f"width-{b}", widths=(b,)) for b in ALL_WIDTHS),
    Case("group-32-all-widths", num_experts=8, widths=ALL_WIDTHS),
    Case("group-64", hidden_size=192, intermediate_size=64, group_size=64, widths=(1, 2, 4, 8, 3)),
    Case("group-128", hidden_size=128, intermediate_size=384, group_size=128, widths=(7, 3, 5, 6)),
    Case("group-128-many-tokens", num_tokens=50, num_experts=2, hidden_size=256, intermediate_size=128, group_size=128),
    Case("one-token", num_tokens=1),
    Case("no-token", num_tokens=0),
    Case("63-tokens", num_tokens=63, ids_dtype=torch.int64),
    Case("16-tokens", num_tokens=16),
    Case("40-tokens-group-128", num_tokens=40, hidden_size=128, intermediate_size=256, group_size=128),
    Case("40-tokens-of-32-experts", num_tokens=40, top_k=8, num_experts=32, hidden_size=64, intermediate_size=64),
    # More routes per expert than the largest tile holds.
    Case("300-tokens", num_tokens=300, num_experts=3, hidden_size=32, intermediate_size=32),
    Case("130-tokens-foreign", num_tokens=130, num_experts=2, hidden_size=32, intermediate_size=32, routing="foreign"),
    Case("one-expert-only", num_tokens=70, top_k=1, routing="one expert"),
    Case("one-expert-twice", routing="one expert"),
    Case("padding", num_tokens=9, routing="padding"),
    Case("all-skipped", num_tokens=3, routing="all skipped"),
    Case("foreign-experts", num_tokens=9, routing="foreign", ids_dtype=torch.int64),
    Case("weight-on-input", num_tokens=7, top_k=1, apply_router_weight_on_input=True),
    Case("gelu", gate=Gate("gelu")),
    Case("gelu-tanh", gate=Gate("gelu_tanh")),
    Case("clamped-swiglu-and-bias", gate=Gate("silu", limit=0.75, alpha=1.702, beta=1.0), has_bias=True),
    Case("bias-and-weight-on-input", top_k=1, has_bias=True, apply_router_weight_on_input=True),
    Case("swiglustep", gate=Gate("swiglustep", limit=0.5)),
    Case("relu2-with-a-gate", gate=Gate("relu2")),
    *(Case(f"no-gate-{name}", gate=Gate(name), has_gate=False) for name in ("silu", "gelu", "gelu_tanh", "relu2")),
    # An odd number of blocks of 16 and of 32 rows, as 1856 rows are of 64.
    Case("no-gate-all-widths", 9, 2, 6, 64, 224, gate=Gate("relu2"), has_gate=False, widths=ALL_WIDTHS),
    Case(
        "no-gate-bias-and-weight-on-input",
        7,
        1,
        has_bias=True,
        gate=Gate("relu2"),
        has_gate=False,
        apply_router_weight_on_input=True,
    ),
    Case("no-gate-100-tokens-padding", 100, gate=Gate("relu2"), has_gate=False, routing="padding"),
    Case("no-gate-one-token-group-64", 1, 2, 4, 128, 192, 64, gate=Gate("relu2"), has_gate=False),
    Case("no-gate-300-tokens-group-64", 300, 2, 3, 128, 192, 64, (1, 2, 3, 4), Gate("relu2"), has_gate=False),
    Case("zero-points-at-the-ends", widths=(3, 8, 5), zero_points=(0.0, 1.0)),
    # Tiles in which weights are scaled, not products.
    Case("100-tokens-all-widths", num_tokens=100, widths=ALL_WIDTHS),
    Case("100-tokens-padding", num_tokens=100, widths=(2, 3, 4), routing="padding", group_size=32),
    Case("100-tokens-clamped-swiglu-and-bias", num_tokens=100, gate=Gate("silu", 0.75, 1.702, 1.0), has_bias=True),
    Case("100-tokens-zero-points-at-the-ends", num_tokens=100, widths=(3, 8, 5), zero_points=(0.0, 1.0)),
    # float16 has no number as small as these scales with all its digits.
    Case("100-tokens-small-weights", num_tokens=100, shrink=1024),
    Case("200-tokens-group-128", 200, num_experts=2, hidden_size=256, intermediate_size=128, group_size=128),
    Case("300-tokens-group-64", 300, 2, 3, hidden_size=128, intermediate_size=192, group_size=64, widths=(1, 2, 3, 4)),
]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=lambda case: case.name)


def pytest_collection_modifyitems(items):
    """Cases that a module does not count among its ``QUICK`` ones are for when the kernels change."""
    for item in items:
        quick = getattr(getattr(item, "module", None), "QUICK", None)
        if (
            quick
            and "case" in item.fixturenames
            and item.callspec.id not in quick
            and not item.get_closest_marker("gpu")
        ):
            item.add_marker(pytest.mark.kernels)


@dataclass(frozen=True)
class Problem:
    """The arguments of ``fused_moe`` and what it must return, in float64."""

    x: torch.Tensor
    weights: MoEWeights
    routing: Routing
    expected: torch.Tensor

    @property
    def inputs(self) -> tuple[torch.Tensor, MoEWeights, Routing]:
        return self.x, self.weights, self.routing

    def to(self, device: str) -> Problem:
        """On a device, with weights as a GPU takes them."""
        experts = (tiled_on(device, self.weights.w13), tiled_on(device, self.weights.w2))
        biases = (on(device, self.weights.w13_bias), on(device, self.weights.w2_bias))
        # On a CPU, where kernels are interpreted or emulated, the operator would refuse a GPU's order.
        weights = MoEWeights(*experts, *biases, self.weights.gate, checked=device == "cpu")
        tensors = (on(device, t) for t in (self.routing.topk_weights, self.routing.topk_ids, self.routing.expert_map))
        routing = Routing(*tensors, self.routing.apply_router_weight_on_input)
        return Problem(self.x.to(device), weights, routing, self.expected)


def on(device: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


def tiled_on(device: str, experts: PackedExperts) -> PackedExperts:
    tensors = (t.to(device, copy=True) for t in experts.tensors)
    return repack_(PackedExperts(*tensors, experts.group_size, experts.widths))


def random_matrix(
    out_features: int,
    in_features: int,
    num_bits: int,
    group_size: int,
    zero_points: tuple[float, float] = Case.zero_points,
    shrink: int = 1,
):
    """A stored matrix whose weights are about normal with variance 1 / in_features, but for the last two options."""
    groups = (out_features, in_features // group_size)
    codes = torch.randint(0, 2**num_bits, (out_features, in_features), dtype=torch.uint8)
    # Steps are 8.5 on average.
    scale = (torch.rand(out_features, 1) + 0.5) * 3 / 8.5 / 2**num_bits / in_features**0.5 / shrink
    low, high = zero_points
    zero_point = ((torch.rand(groups) * (high - low) + low) * 16).to(torch.uint8)
    grid = zero_point << 4 | torch.randint(0, 16, groups, dtype=torch.uint8)
    return pack(codes, num_bits), scale.bfloat16(), grid, num_bits


def random_experts(num_bits: list[list[int]], N: int, K: int, group_size: int, *options) -> PackedExperts:
    return PackedExperts.from_matrices(
        [[random_matrix(N, K, bits, group_size, *options) for bits in projections] for projections in num_bits]
    )


def random_routing(case: Case) -> tuple[torch.Tensor, torch.Tensor | None]:
    """topk_ids and expert_map."""
    shape, last = (case.num_tokens, case.top_k), case.num_experts - 1
    # The first expert always stays empty.
    ids, expert_map = torch.randint(1, case.num_experts, shape), None
    if case.routing == "one expert":
        ids.fill_(last)
    elif case.routing == "padding":
        ids[torch.rand(shape) < 0.4] = -1
        ids[0], ids[-1] = -1, last
    elif case.routing == "all skipped":
        ids.fill_(-1)
    elif case.routing == "foreign":
        # Twice as many experts as this rank holds, every other one here, in reverse order.
        expert_map = torch.full((2 * case.num_experts,), -1, dtype=torch.int32)
        expert_map[1::2] = torch.arange(case.num_experts, dtype=torch.int32).flip(0)
        ids = torch.randint(-1, 2 * case.num_experts, shape)
    return ids.to(case.ids_dtype), expert_map


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small are only held up by threads, on a busy machine by a hundred times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_problem():
    def make(case: Case, dtype: torch.dtype) -> Problem:
        torch.manual_seed(0)
        deal = iter(case.widths * 3 * case.num_experts)
        bits = [[next(deal) for _ in range(3)] for _ in range(case.num_experts)]
        hidden, intermediate, group = case.hidden_size, case.intermediate_size, case.group_size
        options = (case.zero_points, case.shrink)
        first = [projections[: 1 + case.has_gate] for projections in bits]
        w13 = random_experts(first, intermediate, hidden, group, *options)
        w2 = random_experts([projections[2:] for projections in bits], hidden, intermediate, group, *options)
        x = (torch.randn(case.num_tokens, hidden) * case.shrink).to(dtype)
        topk_ids, expert_map = random_routing(case)
        routing = Routing(torch.rand(topk_ids.shape), topk_ids, expert_map, case.apply_router_weight_on_input)
        w13_bias = torch.randn(case.num_experts, 1 + case.has_gate, intermediate) if case.has_bias else None
        w2_bias = torch.randn(case.num_experts, hidden).to(dtype) if case.has_bias else None
        weights = MoEWeights(w13, w2, w13_bias, w2_bias, case.gate)
        return Problem(x, weights, routing, fused_moe_reference(x, weights, routing))

    return make


@pytest.fixture
def cases():
    return {case.name: case for case in CASES}


@pytest.fixture
def default_case():
    return Case("default")


@pytest.fixture
def make_experts():
    return random_experts


@pytest.fixture
def poisoned_empty():
    """torch.empty yields NaN, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def assert_close():
    def check(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, many_routes: bool = False) -> None:
        """Largest and root-mean-square error, in units of dtype's precision and of the expected values' size."""
        assert actual.dtype == dtype
        assert actual.shape == expected.shape
        if not expected.any():
            assert not actual.any()
            return
        error = actual.cpu().double() - expected
        eps = torch.finfo(dtype).eps
        worst = (error.abs().max() / expected.abs().max() / eps).item()
        rms = (error.square().mean() / expected.square().mean()).sqrt().item() / eps
        assert worst <= MAX_ERROR[dtype]
        assert rms <= (RMS_ERROR_MANY_ROUTES if many_routes else RMS_ERROR)[dtype]

    return check
