import subprocess
import sys

import pytest


def demo(root, *arguments):
    command = [sys.executable, "-m", "benchmarks.demo", "tests/models/docs-moe", "--bits", "3.5", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_demo_ends_with_a_completion(pytestconfig):
    result = demo(pytestconfig.rootpath, "--serve-args=--enforce-eager")
    assert result.returncode == 0, result.stderr
    assert "completion:" in result.stdout


@pytest.mark.long
def test_demo_fails_when_the_server_does(pytestconfig):
    result = demo(pytestconfig.rootpath, "--serve-args=--no-such-option")
    assert result.returncode != 0
    assert "vllm serve ended with status" in result.stderr
