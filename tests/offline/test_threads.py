"""Where work runs: threads are lowered for it and restored after it, and processes are used when they pay."""

import math

import pytest
import torch

from offline import threads
from offline.threads import WORTH_PROCESSES, available_cores, choose_workers, cpu_quota, one_thread


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
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: math.inf)
    assert choose_workers(None, WORTH_PROCESSES) == 3
    assert choose_workers(None, WORTH_PROCESSES - 1) == 1


def test_choose_workers_does_as_it_is_told(monkeypatch):
    monkeypatch.setattr(threads, "compute_device", lambda: torch.device("cpu"))
    assert choose_workers(7, 1) == 7
    assert choose_workers(1, WORTH_PROCESSES) == 1
    with pytest.raises(ValueError, match="`workers`: expected a number of processes from 1 up, got 0"):
        choose_workers(0, 1)


def test_choose_workers_leaves_a_gpu_to_one_process(monkeypatch):
    monkeypatch.setattr(threads, "compute_device", lambda: torch.device("cuda"))
    assert choose_workers(8, WORTH_PROCESSES) == 1


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/", {}, math.inf),
        ("0::/", {"cpu.max": "max 100000\n"}, math.inf),
        # As a container sees its own group, in the place of the root.
        ("0::/", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/docker/abc", {"cpu.max": "150000 100000\n"}, 1.5),
        # The least of a group's and of those above it.
        ("0::/a/b", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "800000 100000\n"}, 2.0),
        ("0::/a/b", {"a/cpu.max": "max 100000\n", "a/b/cpu.max": "300000 100000\n"}, 3.0),
        (
            "4:memory:/x\n3:cpu,cpuacct:/x\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        (
            "3:cpu,cpuacct:/x",
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            math.inf,
        ),
        ("0::/", {"cpu.max": "of another kind\n"}, math.inf),
    ],
)
def test_cpu_quota(tmp_path, membership, files, quota):
    (tmp_path / "membership").write_text(membership)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cpu_quota(tmp_path, tmp_path / "membership") == quota


@pytest.mark.parametrize(("quota", "cores"), [(math.inf, 3), (0.5, 1), (2.5, 2), (8.0, 3)])
def test_quota_counts(monkeypatch, quota, cores):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    assert available_cores() == cores
