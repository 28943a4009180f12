"""Every preset's commands are ones that their programs take."""

import subprocess
import sys

import pytest

LAST = "$ python -m benchmarks.report"


def run(*arguments):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "modules"),
    [
        (["short"], ["benchmarks.convert", "benchmarks.quality", "benchmarks.serving"]),
        (["gpu"], ["benchmarks.kernels", "benchmarks.generate", "benchmarks.convert", "benchmarks.serving"]),
        (["paper", "--text", "LICENSE"], ["benchmarks.quality", "benchmarks.zero_shot", "offline.convert"]),
    ],
    ids=["short", "gpu", "paper"],
)
def test_commands_of_a_preset_parse(arguments, modules):
    result = run("benchmarks.suite", *arguments, "--dry-run")
    assert result.returncode == 0, result.stderr
    commands = result.stdout.splitlines()
    assert commands[-1] == LAST
    assert {line.split()[3] for line in commands[:-1]} == set(modules)


def test_paper_asks_for_its_text():
    result = run("benchmarks.suite", "paper", "--dry-run")
    assert (result.returncode, "add --text FILE" in result.stderr) == (2, True)


def test_zero_shot_without_lm_eval_says_how_to_get_it():
    code = "import sys, runpy; sys.modules['lm_eval'] = None; sys.argv[1:] = ['x']; "
    code += "runpy.run_module('benchmarks.zero_shot', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "error: expected lm-eval" in result.stderr
    assert 'pip install ".[eval]"' in result.stderr
