"""Where work runs: threads are lowered for it and restored after it, and processes are used when they pay."""

import math
import os
import pickle
from pathlib import Path

import pytest
import torch

from alphaq_vllm import cores
from offline import threads
from offline.parallel import run_all
from offline.threads import WORTH_PROCESSES, SharedTensor, choose_workers, one_thread


def test_one_thread_restores_the_number_also_after_a_failure():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_choose_workers_takes_all_available_cores_when_the_work_is_worth_it(monkeypatch):
    monkeypatch.setattr(threads, "compute_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    monkeypatch.setattr(cores, "cpu_quota", lambda: math.inf)
    assert choose_workers(None, WORTH_PROCESSES) == 3
    assert choose_workers(None, WORTH_PROCESSES - 1) == 1


def test_choose_workers_does_as_it_is_told(monkeypatch):
    monkeypatch.setattr(threads, "compute_device", lambda: torch.device("cpu"))
    assert choose_workers(7, 1) == 7
    assert choose_workers(1, WORTH_PROCESSES) == 1
    monkeypatch.setattr(threads, "available_cores", lambda: 200)
    assert choose_workers(200, 1) == 200
    for number in (0, 201):
        with pytest.raises(ValueError, match=f"`workers`: expected a number of processes from 1 to 200, got {number}"):
            choose_workers(number, 1)
    monkeypatch.setattr(threads, "available_cores", lambda: 2)
    assert choose_workers(threads.MOST_PROCESSES, 1) == threads.MOST_PROCESSES


def test_choose_workers_leaves_a_gpu_to_one_process(monkeypatch):
    monkeypatch.setattr(threads, "compute_device", lambda: torch.device("cuda"))
    assert choose_workers(8, WORTH_PROCESSES) == 1


def add_one(shared):
    shared.tensor += 1
    return shared.tensor.sum().item()


def test_a_shared_tensor_is_the_same_memory_in_every_process():
    shared = SharedTensor((2, 3), torch.device("cpu"))
    shared.tensor.zero_()
    (result,) = run_all(add_one, [shared], workers=2, shared=shared)
    assert result == (shared, 6.0)
    assert torch.equal(shared.tensor, torch.ones(2, 3))
    assert len(pickle.dumps(SharedTensor((1000, 1000), torch.device("cpu")))) < 1000


def test_a_shared_tensor_that_cannot_be_shared_is_copied(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    shared = SharedTensor((2, 3), torch.device("cpu"))
    shared.tensor.fill_(3)
    assert torch.equal(pickle.loads(pickle.dumps(shared)).tensor, shared.tensor)


def test_the_memory_of_a_shared_tensor_ends_with_it():
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    shared = SharedTensor((2, 3), torch.device("cpu"))
    assert len(list(descriptors.iterdir())) == before + 1
    del shared
    assert len(list(descriptors.iterdir())) == before
