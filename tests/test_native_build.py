"""How native code comes to be: built on first use, kept where nobody else can write, done without at need."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import replace

import pytest

from alphaq_vllm import native_build as build

# What a process of its own prints: the order of experts that prepare_ leaves, and what it logs.
PREPARE = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
from alphaq_vllm.kernels import PackedExperts, prepare_
from alphaq_vllm.packing import pack
grid = torch.zeros(16, 1, dtype=torch.uint8)
matrix = pack(torch.zeros(16, 32, dtype=torch.uint8), 3), torch.ones(16, 1).bfloat16(), grid, 3
for _ in range(2):
    print(prepare_(PackedExperts.from_matrices([[matrix]])).order)
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty directory for libraries."""
    monkeypatch.setenv("ALPHAQ_CACHE", str(tmp_path))
    return tmp_path / "kernels"


def prepare(**env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PREPARE]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **env}, timeout=300)


def test_is_built_once_in_a_directory_that_is_the_users_alone(cache):
    processes = [subprocess.Popen([sys.executable, "-c", PREPARE], stdout=subprocess.PIPE, text=True) for _ in "12"]
    assert [process.communicate(timeout=300)[0].split() for process in processes] == [["cpu", "cpu"]] * 2
    (library,) = cache.glob("*.so")
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert sorted(path.name for path in cache.iterdir()) == [library.name, f"{library.name}.lock"]
    written = library.stat().st_mtime_ns
    assert prepare().stdout.split() == ["cpu", "cpu"]
    assert library.stat().st_mtime_ns == written


def test_a_directory_that_others_can_write_to_is_not_used(cache, monkeypatch):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    path = build.library_path(build.KERNEL, build.PORTABLE)
    assert path.parent != cache
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"PATH": "/nowhere"}, r"no C\+\+ compiler: install g\+\+, or name one in CXX"),
        ({"CXX": "/nowhere/g++ -O1"}, r".*No such file or directory: '/nowhere/g\+\+'"),
        ({"CXX": "false"}, r"false -std=c\+\+17 .*: failed"),
    ],
    ids=["none", "missing", "failing"],
)
def test_without_a_compiler_torch_computes_and_the_log_says_so_once(cache, env, reason):
    result = prepare(**env)
    assert result.stdout.split() == ["checkpoint", "checkpoint"]
    slow = "WARNING AlphaQ computes experts with torch, many times slower than its CPU kernel: "
    assert re.fullmatch(re.escape(slow) + reason, result.stderr.strip()), result.stderr
    assert not list(cache.glob("*.so"))


def test_a_compiler_that_does_not_know_the_best_instruction_set_builds_the_next(cache, tmp_path):
    best, second = build.supported()[:2]
    compiler = tmp_path / "g++"
    unknown = "|".join(
        f"*{option}*" for option in set(build.instruction_sets()[best]) - {*build.instruction_sets()[second]}
    )
    compiler.write_text(f'#!/bin/sh\ncase "$*" in {unknown}) echo unknown option >&2; exit 1;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    result = prepare(CXX=str(compiler))
    assert result.stdout.split() == ["cpu", "cpu"]
    assert re.fullmatch(
        rf"WARNING AlphaQ's CPU kernel uses {second}, not {best}: .*: unknown option", result.stderr.strip()
    )


def test_the_instruction_set_can_be_chosen(cache):
    assert prepare(ALPHAQ_CPU_KERNEL="none").stdout.split() == ["checkpoint", "checkpoint"]
    assert not cache.exists()
    assert prepare(ALPHAQ_CPU_KERNEL="portable").stdout.split() == ["cpu", "cpu"]
    assert "-portable-" in next(cache.glob("*.so")).name
    assert re.search(
        r"ALPHAQ_CPU_KERNEL: expected one of .*portable, none here, got mmx", prepare(ALPHAQ_CPU_KERNEL="mmx").stderr
    )


@pytest.mark.parametrize("sources", [build.KERNEL, build.QUANTIZERS], ids=lambda sources: sources.main)
def test_every_instruction_set_of_this_machine_compiles(sources, tmp_path):
    compiler = build.find_compiler()
    assert compiler
    for name in build.instruction_sets():
        if name not in build.supported():
            build.compile_to(tmp_path / name, sources, name, compiler)
            assert (tmp_path / name).is_file()


def test_the_command_builds_into_the_package(tmp_path, monkeypatch, cache):
    """So an image needs no compiler later."""
    for name in ("KERNEL", "QUANTIZERS"):
        sources = getattr(build, name)
        shutil.copytree(sources.directory, tmp_path / name)
        monkeypatch.setattr(build, name, replace(sources, directory=tmp_path / name))
    monkeypatch.setattr(sys, "argv", ["build", build.PORTABLE])
    build.main()
    monkeypatch.setenv("PATH", "/nowhere")
    for sources in (build.KERNEL, build.QUANTIZERS):
        assert build.library_path(sources, build.PORTABLE).parent == sources.directory
    assert not cache.exists()
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler"):
        build.main()
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["build", "mmx"])
    with pytest.raises(SystemExit, match=r"mmx: expected one of .*portable"):
        build.main()
