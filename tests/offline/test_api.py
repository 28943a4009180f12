"""The functions in Python, in programs as users write them, in folders as users have them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import alphaq_vllm
from tests.conftest import MODEL

ROOT = Path(__file__).parents[2]
# As a user would write it: no main guard, more than one process.
SCRIPT = """
import sys
print("ran once")
from alphaq_vllm import allocate, convert, dequantize, inspect, measure, validate
model, folder = sys.argv[1], sys.argv[2]
statistics = measure(model, f"{folder}/stats.csv", noise="measured", workers=2)
choice = allocate(statistics, f"{folder}/map.json", bits=2.5)
summary = convert(model, f"{folder}/out", bit_map=choice.bits, quantizer="rtn", workers=2)
assert summary.bits <= 2.5 and inspect(f"{folder}/out")["bits"] == summary.bits
assert validate(f"{folder}/out", source=model)["matrices"] == summary.matrices
assert dequantize(f"{folder}/out", f"{folder}/plain", dtype="float32")["dtype"] == "float32"
"""


@pytest.fixture
def trap(tmp_path):
    """A working directory with a folder ``offline`` of the user's own, which must not be run."""
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline" / "__init__.py").write_text("open('ran', 'w')\nraise SystemExit(9)\n")
    return tmp_path


def test_case_12_a_script_without_a_main_guard_measures_allocates_converts_and_reads(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(MODEL), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "ran once\n"), result.stderr
    assert set(json.loads((tmp_path / "map.json").read_bytes()).values()) <= {2, 3, 4}


def test_processes_do_not_run_a_folder_of_the_same_name(trap):
    code = (
        "import sys; sys.path.remove(''); from alphaq_vllm import measure; "
        f"measure({str(MODEL)!r}, None, noise='measured', workers=2)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=trap, check=True)
    assert not (trap / "ran").exists()


def test_measuring_for_vllm_does_not_run_a_folder_of_the_same_name(trap):
    code = f"""
import sys; sys.path.remove('')
from offline.allocation.widths import Budget
from offline.operations.cache import cached_statistics
from offline.operations.plan import Job
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts
source = open_checkpoint({str(MODEL)!r})
cached_statistics(Job({str(MODEL)!r}, source, find_experts(source)), Budget(noise="analytic"))
"""
    environment = {"ALPHAQ_CACHE": str(trap / "cache"), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=trap, env=environment, check=True)
    assert not (trap / "ran").exists()


def test_a_folder_that_hides_the_converter_is_named_and_not_run(trap):
    code = "import alphaq_vllm; alphaq_vllm.convert"
    result = subprocess.run([sys.executable, "-c", code], cwd=trap, capture_output=True, text=True, check=False)
    assert f"ImportError: offline: expected AlphaQ's package in {ROOT}, got {trap / 'offline'}" in result.stderr
    assert not (trap / "ran").exists()


def test_commands_in_a_checkout_without_its_packages_say_what_to_do():
    command = [sys.executable, "-I", "-S", "-c"]
    code = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); runpy._run_module_as_main('offline.convert')"
    result = subprocess.run([*command, code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert "expected the packages that it needs, got none: run python3 .ci/install.py VENV" in result.stderr


def test_public_names():
    names = {"plan", "convert", "measure", "allocate", "inspect", "validate", "dequantize", "upload"}
    assert names <= set(dir(alphaq_vllm))
    with pytest.raises(AttributeError, match="has no attribute 'konvert'"):
        _ = alphaq_vllm.konvert
