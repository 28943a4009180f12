"""The kernels' check of themselves, and the user's choice among them, on an emulated GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from alphaq_vllm.kernels import SILU, MoEWeights, PackedExperts, fused_moe, prepare_, repack_
from alphaq_vllm.kernels.choice import KERNELS
from alphaq_vllm.kernels.triton import check, devices, layer
from alphaq_vllm.kernels.triton.tiles import TILES, choose_tiles
from tests.emulator.driver import emulated

WIDTHS = [[2, 2, 3], [4, 2, 2]]


def stored_layer(make_experts):
    torch.manual_seed(0)
    w13 = make_experts([bits[:2] for bits in WIDTHS], 32, 32, 32)
    w2 = make_experts([bits[2:] for bits in WIDTHS], 32, 32, 32)
    # All layers of a model know all its widths.
    return MoEWeights(*(replace(experts, widths=(2, 3, 4)) for experts in (w13, w2)), checked=True)


def copied(experts: PackedExperts) -> PackedExperts:
    return PackedExperts(*(t.clone() for t in experts.tensors), experts.group_size, experts.widths)


def repacked(weights: MoEWeights) -> MoEWeights:
    return MoEWeights(*(repack_(copied(experts)) for experts in (weights.w13, weights.w2)), checked=True)


@pytest.fixture
def emulated_gpu(monkeypatch):
    monkeypatch.setattr(devices, "device_of", lambda _: devices.Device(4, 9, overlap=True, ptx=True))
    with emulated(90):
        yield


@pytest.fixture
def sample(make_experts):
    stored = stored_layer(make_experts)
    return stored, check.Sample.of(stored, check.routing_of(stored, 2, None, False), torch.bfloat16)


def test_kernels_that_are_right_pass(sample, emulated_gpu, monkeypatch):
    stored, given = sample
    seen = []
    compute = layer.fused_moe
    monkeypatch.setattr(layer, "fused_moe", lambda x, *rest: seen.append(len(x)) or compute(x, *rest))
    check.check(repacked(stored), given)
    assert {choose_tiles(2 * tokens, 2, 9, widest=4) for tokens in seen} == set(TILES[9])


def test_the_sample_has_every_width(make_experts):
    three = [[[2, 2], [2, 3], [4, 2]], [[3], [2], [2]]]
    stored = MoEWeights(*(make_experts(bits, 32, 32, 32) for bits in three))
    assert set(check.routing_of(stored, 2, None, False).topk_ids.unique().tolist()) == {0, 2}
    expert_map = torch.tensor([-1, 2, 1, -1, 0, -1], dtype=torch.int32)
    assert set(check.routing_of(stored, 2, expert_map, False).topk_ids.unique().tolist()) == {4, 1}


@pytest.mark.parametrize("what", ["scales", "packed", "grids"])
def test_weights_that_kernels_read_otherwise_are_refused(what, sample, emulated_gpu):
    stored, given = sample
    weights = repacked(stored)
    tensor = getattr(weights.w2, what)
    tensor.copy_(tensor.roll(1, 0))
    with pytest.raises(ValueError, match=r"1 tokens in Tiles\(block_m=16, .*: expected .* an error of up to .*, got"):
        check.check(weights, given)


def test_a_tile_that_is_wrong_alone_is_named(sample, emulated_gpu, monkeypatch):
    stored, given = sample
    compute = layer.fused_moe

    def wrong_for_many(x, weights, routing):
        out = compute(x, weights, routing)
        if len(x) > 50:
            out[-1, -1] += 1
        return out

    monkeypatch.setattr(layer, "fused_moe", wrong_for_many)
    monkeypatch.setenv(KERNELS, "plain")
    message = r"ALPHAQ_KERNELS=plain, \d+ tokens in Tiles\(block_m=64.*: expected equal results .*: set .* to torch "
    with pytest.raises(ValueError, match=message):
        check.check(repacked(stored), given)


def test_not_a_number_is_refused(sample, emulated_gpu):
    stored, given = sample
    weights = repacked(stored)
    weights.w13.scales[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="got nan"):
        check.check(weights, given)


def test_the_fingerprint_tells_what_kernels_depend_on(sample, monkeypatch):
    stored, given = sample
    others = [
        (replace(stored, gate=SILU._replace(limit=7.0)), given.routing, torch.bfloat16),
        (stored, replace(given.routing, expert_map=torch.zeros(8, dtype=torch.int32)), torch.bfloat16),
        (stored, given.routing, torch.float16),
    ]
    prints = {check.fingerprint(stored, given.routing, torch.bfloat16), *(check.fingerprint(*o) for o in others)}
    monkeypatch.setenv(KERNELS, "plain")
    assert len({*prints, check.fingerprint(stored, given.routing, torch.bfloat16)}) == 5


@pytest.mark.parametrize(("choice", "fast"), [("fast", True), ("", True), ("plain", False)])
def test_plain_kernels_have_neither_ptx_nor_launches_that_overlap(choice, fast, monkeypatch):
    properties = SimpleNamespace(major=9, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setenv(KERNELS, choice)
    assert devices.device_of.__wrapped__(torch.device("cuda")) == devices.Device(132, 9, overlap=fast, ptx=fast)


@pytest.mark.kernels
def test_plain_kernels_are_right(sample, monkeypatch):
    stored, given = sample
    monkeypatch.setattr(devices, "device_of", lambda _: devices.Device(4, 9, overlap=False, ptx=False))
    with emulated(90):
        check.check(repacked(stored), given)


def test_torch_computes_from_the_order_of_the_checkpoint(sample, monkeypatch):
    stored, given = sample
    monkeypatch.setenv(KERNELS, "torch")
    experts = [prepare_(copied(experts)) for experts in (stored.w13, stored.w2)]
    assert {e.order for e in experts} == {"checkpoint"}
    actual = fused_moe(given.x.float(), MoEWeights(*experts), given.routing)
    assert torch.equal(actual, given.expected)


def test_a_choice_that_there_is_not_is_refused(sample, monkeypatch):
    monkeypatch.setenv(KERNELS, "fastest")
    with pytest.raises(ValueError, match="ALPHAQ_KERNELS: expected one of fast, plain, torch, got fastest"):
        prepare_(sample[0].w13)
