"""What GPU kernels go through before a layer is served with them, on an emulated GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from alphaq_vllm.kernels import MoEWeights, PackedExperts, repack_
from alphaq_vllm.kernels.choice import KERNELS
from alphaq_vllm.kernels.triton import check, devices, layer
from alphaq_vllm.plugin import gpu_kernels
from alphaq_vllm.plugin.gpu_kernels import Preparation, check_choice
from tests.emulator.driver import emulated
from tests.kernels.conftest import random_experts

LAYER = SimpleNamespace(expert_map=None, apply_router_weight_on_input=False)
MOE = SimpleNamespace(experts_per_token=1, in_dtype=torch.float16)


@pytest.fixture
def first_start(tmp_path, monkeypatch):
    """A GPU that nothing is known of; of the tiles, that for one token alone."""
    monkeypatch.setenv("ALPHAQ_CACHE", str(tmp_path))
    monkeypatch.setattr(gpu_kernels, "_passed_here", set())
    monkeypatch.setattr(devices, "device_of", lambda _: devices.Device(4, 9, overlap=True, ptx=True))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU of a test")
    every_tile = layer.every_tile
    monkeypatch.setattr(layer, "every_tile", lambda *arguments: [next(every_tile(*arguments))])
    with emulated(90):
        yield tmp_path


def stored_layer() -> MoEWeights:
    torch.manual_seed(0)
    return MoEWeights(random_experts([[2, 2]], 32, 32, 32), random_experts([[2]], 32, 32, 32), checked=True)


def repacked(weights: MoEWeights) -> MoEWeights:
    copies = [PackedExperts(*(t.clone() for t in e.tensors), 32, e.widths) for e in (weights.w13, weights.w2)]
    return MoEWeights(*map(repack_, copies), checked=True)


def start(weights: MoEWeights, served: MoEWeights, made_up: bool = False) -> Preparation:
    preparation = Preparation(MOE, LAYER, weights, made_up)
    preparation.finish(served)
    return preparation


def test_a_first_start_compares_and_the_next_remembers(first_start, monkeypatch):
    weights = stored_layer()
    assert start(weights, repacked(weights)).sample is not None
    monkeypatch.setattr(gpu_kernels, "_passed_here", set())
    assert start(weights, repacked(weights)).sample is None
    monkeypatch.setenv(KERNELS, "plain")
    assert start(weights, repacked(weights)).sample is not None


def test_kernels_that_differ_are_not_served_nor_remembered(first_start):
    weights = stored_layer()
    wrong = repacked(weights)
    wrong.w2.packed.copy_(wrong.w2.packed.roll(1))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"an emulated GPU, .*: set ALPHAQ_KERNELS to plain"):
            start(weights, wrong)
    assert not [*first_start.rglob("*.*")]


def test_made_up_weights_are_only_compiled_for(first_start):
    weights = stored_layer()
    weights.w13.scales.fill_(torch.nan)
    assert start(weights, repacked(weights), made_up=True).sample is None


def test_a_cache_that_cannot_be_written_serves(first_start, monkeypatch):
    place = first_start / "file"
    place.touch()
    monkeypatch.setenv("ALPHAQ_CACHE", str(place / "cache"))
    weights = stored_layer()
    assert start(weights, repacked(weights)).sample is not None
    # The next layer of the same model.
    assert start(weights, repacked(weights)).sample is None


@pytest.mark.parametrize(("eager", "refused"), [(True, False), (False, True)])
def test_torch_on_a_gpu_needs_eager_execution(eager, refused, monkeypatch):
    config = SimpleNamespace(model_config=SimpleNamespace(enforce_eager=eager))
    monkeypatch.setattr(gpu_kernels, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(gpu_kernels, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setenv(KERNELS, "torch")
    if refused:
        with pytest.raises(ValueError, match="ALPHAQ_KERNELS=torch: expected --enforce-eager"):
            check_choice()
    else:
        check_choice()


def test_a_choice_that_there_is_not_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setenv(KERNELS, "best")
    with pytest.raises(ValueError, match="ALPHAQ_KERNELS: expected one of fast, plain, torch, got best"):
        check_choice()


def test_the_sample_is_of_the_check_itself():
    assert check.Sample.of(
        stored_layer(), check.routing_of(stored_layer(), 1, None, True), torch.float16
    ).expected.any()
