"""A process counts the cores that it may use, not those that the machine has."""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from alphaq_vllm import checksums, cores
from alphaq_vllm.cores import available_cores, cpu_quota, within_quota


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


@pytest.mark.parametrize(("quota", "expected"), [(math.inf, 3), (0.5, 1), (2.5, 2), (8.0, 3)])
def test_case_14_a_quota_counts(monkeypatch, quota, expected):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert available_cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [(math.inf, 8), (0.5, 1), (2.5, 2)])
def test_threads_keep_within_the_quota(monkeypatch, quota, expected):
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert within_quota(8) == expected


def test_case_14_sums_are_computed_on_as_many_threads_as_may_run(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(checksums, "available_cores", lambda: 3)
    monkeypatch.setattr(
        checksums, "ThreadPoolExecutor", lambda workers: asked.append(workers) or ThreadPoolExecutor(workers)
    )
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / checksums.SUMS).write_text(checksums.render_sums(tmp_path))
    assert checksums.check_sums(tmp_path) == 1
    assert asked == [3]


def test_nobody_else_counts_cores():
    counting = re.compile(r"os\.cpu_count\(|process_cpu_count|multiprocessing\.cpu_count")
    root = Path(__file__).parents[1]
    files = [file for room in ("alphaq_vllm", "offline", "benchmarks") for file in (root / room).rglob("*.py")]
    found = {file.relative_to(root).as_posix() for file in files if counting.search(file.read_text())}
    assert found == {"alphaq_vllm/cores.py"}
