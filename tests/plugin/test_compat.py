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


HIDE = """
import vllm.model_executor.layers.fused_moe as fused_moe
del fused_moe.RoutedExperts
import alphaq_vllm
alphaq_vllm.register()
"""


def test_register_without_an_interface_names_both_versions():
    result = subprocess.run([sys.executable, "-c", HIDE], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith(f"ImportError: alphaq-vllm needs {RANGE}, got vLLM {_compat.vllm.__version__} (")
    assert "RoutedExperts" in message


def test_local_expert_ids_without_expert_parallelism_are_all():
    assert _compat.local_expert_ids(Manager(None), 3) == [0, 1, 2]


def test_local_expert_ids_are_in_the_order_of_the_local_ids():
    assert _compat.local_expert_ids(Manager(torch.tensor([-1, 1, -1, 0, 2])), 5) == [3, 1, 4]
