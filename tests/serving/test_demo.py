import subprocess
import sys

DEMO = [sys.executable, "-m", "benchmarks.demo", "tests/models/docs-moe", "--bits", "3.5"]


def test_demo_ends_with_a_completion(pytestconfig):
    result = subprocess.run(DEMO, cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "completion:" in result.stdout


def test_demo_fails_when_the_server_does(pytestconfig):
    command = [*DEMO, "--serve-args=--no-such-option"]
    result = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert result.returncode != 0
    assert "vllm serve ended with status" in result.stderr
