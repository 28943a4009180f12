"""Stand-ins for what vLLM makes for a GPU: its classes can then be built and loaded where there is none."""

import sys
from importlib.util import find_spec
from unittest.mock import MagicMock

import pytest
import torch
from vllm.model_executor.models import registry
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker import workspace

TORCHVISION = (
    "torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.transforms.v2"
)  # fmt: skip


class Event:
    """What vLLM makes for a GPU also where there is none."""


@pytest.fixture
def events(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "Event", Event)


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Event)
    platform = type(current_platform)
    choose = platform.get_attn_backend_cls

    def chosen(selected_backend, attn_selector_config, num_heads=None):
        # vLLM has no sparse attention for CPUs.
        if attn_selector_config.use_sparse:
            return AttentionBackendEnum.FLASHMLA_SPARSE.get_path()
        return choose(selected_backend, attn_selector_config, num_heads)

    monkeypatch.setattr(platform, "get_attn_backend_cls", staticmethod(chosen))
    monkeypatch.setattr(workspace, "_manager", workspace.WorkspaceManager(torch.device("cpu")))
    # Its kernels are imported where they are asked for, and they are by default.
    monkeypatch.setenv("VLLM_KIMI_K3_GEMM_AR", "0")


@pytest.fixture
def sight(monkeypatch):
    """Stand-ins for what vLLM's models that see import, where it is not."""
    if find_spec(TORCHVISION[0]) is None:
        for name in TORCHVISION:
            monkeypatch.setitem(sys.modules, name, MagicMock(__path__=[], __spec__=None))
        # vLLM looks at a class in another process before it builds one.
        monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())
