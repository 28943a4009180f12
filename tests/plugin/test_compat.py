"""What the plugin says to versions of vLLM that it was not made for."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alphaq_vllm.plugin import _compat

ROOT = Path(__file__).parents[2]
RANGE = "vLLM 0.26 to 0.33"


class Manager:
    def __init__(self, expert_map):
        self.expert_map = expert_map


@pytest.fixture
def warnings():
    """Messages of the plugin's logger, which vLLM keeps from pytest."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    _compat.logger.addHandler(handler)
    yield records
    _compat.logger.removeHandler(handler)


@pytest.mark.parametrize("version", ["0.26.0", "0.27.1+cpu", "0.32.0+cpu", "0.33.0", "0.33.9rc1.dev3+g0123456"])
def test_check_version_accepts_the_tested_range(version, warnings):
    _compat.check_version(version)
    assert not warnings


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0", "dev"])
def test_check_version_warns_once_of_other_versions(version, warnings):
    for _ in range(2):
        _compat.check_version(version)
    (record,) = warnings
    assert record.levelno == logging.WARNING
    assert RANGE in record.getMessage()
    assert f"this is vLLM {version}:" in record.getMessage()


def test_check_interface_accepts_the_installed_version():
    _compat.check_interface()


def test_check_interface_names_both_versions_and_what_is_missing(monkeypatch):
    monkeypatch.setattr(_compat.vllm, "__version__", "9.9.0")
    monkeypatch.setitem(_compat.INTERFACE, _compat.FusedMoEMethodBase.apply, ("layer", "no_such_parameter"))
    message = rf"needs {RANGE}, got vLLM 9\.9\.0, whose FusedMoEMethodBase\.apply has no no_such_parameter: install"
    with pytest.raises(ImportError, match=message):
        _compat.check_interface()


def run(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


HIDE = """
from vllm.model_executor.layers.quantization import get_quantization_config
get_quantization_config("fp8")
import vllm.model_executor.layers.fused_moe as fused_moe
del fused_moe.RoutedExperts
import alphaq_vllm
alphaq_vllm.register()
print(get_quantization_config("fp8").get_name())
get_quantization_config("alphaq").from_config({})
"""


def test_an_interface_that_is_missing_concerns_alphaq_alone_and_is_named():
    result = run(HIDE)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (1, "fp8")
    message = result.stderr.splitlines()[-1]
    assert message.startswith(f"ImportError: alphaq-vllm needs {RANGE}, got vLLM {_compat.vllm.__version__} (")
    assert "RoutedExperts" in message


def test_register_never_raises():
    code = """
import vllm.model_executor.layers.quantization as quantization
del quantization.register_quantization_config
import alphaq_vllm
alphaq_vllm.register()
"""
    result = run(code)
    assert result.returncode == 0
    assert "This vLLM has no place for --quantization alphaq: cannot import name" in result.stderr + result.stdout


def test_registering_imports_hardly_anything():
    code = """
import sys
import vllm.model_executor.layers.quantization.base_config
before = set(sys.modules)
import alphaq_vllm
alphaq_vllm.register()
new = set(sys.modules) - before
assert all(name.startswith("alphaq_vllm") for name in new) and len(new) < 10, new
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_models_are_replaced_only_where_an_alphaq_checkpoint_is_served():
    code = """
import pickle, sys
import alphaq_vllm
from vllm.model_executor.models.registry import ModelRegistry
def module():
    return ModelRegistry.models["GptOssForCausalLM"].module_name
alphaq_vllm.register()
before = module()
if sys.argv[1:]:
    pickle.loads(bytes.fromhex(sys.argv[1]))
else:
    from alphaq_vllm.plugin.config import AlphaQConfig
    config = pickle.dumps(AlphaQConfig())
    sys.argv.append(config.hex())
# Some versions of vLLM log to stdout.
print("\\n", before, module(), sys.argv[1])
"""
    theirs, ours, config = run(code).stdout.splitlines()[-1].split()
    assert (theirs, ours) == ("vllm.model_executor.models.gpt_oss", "alphaq_vllm.plugin.gpt_oss")
    # As in a worker, to which vLLM sends the config.
    result = subprocess.run([sys.executable, "-c", code, config], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1].split() == [theirs, ours, config]


def test_local_expert_ids_without_expert_parallelism_are_all():
    assert _compat.local_expert_ids(Manager(None), 3) == [0, 1, 2]


def test_local_expert_ids_are_in_the_order_of_the_local_ids():
    assert _compat.local_expert_ids(Manager(torch.tensor([-1, 1, -1, 0, 2])), 5) == [3, 1, 4]
