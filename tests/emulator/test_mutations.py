"""The emulator reports kernels that lack a fence, a wait or a barrier, so those that pass lack none."""

from __future__ import annotations

import pytest
import torch

from alphaq_vllm.kernels import MoEWeights, Routing, repack_
from alphaq_vllm.kernels.triton import devices, layer
from tests.emulator import driver
from tests.emulator.driver import emulated
from tests.emulator.machine import Block
from tests.emulator.mutations import Report, mutate
from tests.kernels.conftest import random_experts

# Kinds of instructions that each generation's kernels must have, so that a test of nothing does not pass.
COPIES = {"bar.sync", "cp.async.commit_group", "cp.async.wait_group"}
KINDS = {
    80: COPIES,
    90: COPIES | {"fence.proxy.async", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group"},
    100: COPIES | {"fence.proxy.async", "tcgen05.wait::st", "tcgen05.commit", "mbarrier.init", "mbarrier.try_wait"},
    120: COPIES,
}
# For how many tokens: the tiles of few routes, and those of many.
NUM_TOKENS = {"few-routes": 4, "many-routes": 150}


def run_mutations(num_tokens: int, sm: int, monkeypatch, *, one_of_each: bool) -> Report:
    report, done = Report(), set()

    class Mutated(Block):
        def run(self, code, ends):
            if id(code) not in done and mutate(self, code, ends, report, one_of_each=one_of_each):
                done.add(id(code))
            super().run(code, ends)

    torch.manual_seed(0)
    hidden, intermediate, group = 512, 384, 128
    w13 = repack_(random_experts([[2, 3], [4, 3]], intermediate, hidden, group))
    w2 = repack_(random_experts([[4], [2]], hidden, intermediate, group))
    x, ids = torch.randn(num_tokens, hidden).bfloat16(), torch.randint(0, 2, (num_tokens, 2), dtype=torch.int32)
    monkeypatch.setattr(devices, "device_of", lambda _: devices.Device(4, sm // 10, overlap=sm >= 90, ptx=True))
    monkeypatch.setattr(driver, "Block", Mutated)
    with emulated(sm):
        layer.fused_moe(x, MoEWeights(w13, w2, checked=True), Routing(torch.rand(ids.shape), ids))
    return report


def check(report: Report, sm: int) -> None:
    assert not report.missed
    assert all(report.rows[kind].caught for kind in KINDS[sm])


@pytest.mark.parametrize("sm", KINDS)
def test_one_removal_of_each_kind_is_reported(sm, monkeypatch):
    check(run_mutations(NUM_TOKENS["few-routes"], sm, monkeypatch, one_of_each=True), sm)


@pytest.mark.long
@pytest.mark.parametrize("tiles", NUM_TOKENS)
@pytest.mark.parametrize("sm", KINDS)
def test_every_removal_is_reported(sm, tiles, monkeypatch):
    report = run_mutations(NUM_TOKENS[tiles], sm, monkeypatch, one_of_each=False)
    print(report)
    check(report, sm)
