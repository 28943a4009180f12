"""vLLM in processes of its own, without servers."""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

# torchvision's wheels on PyPI are for GPUs. vLLM's code for models that see imports it, and text needs nothing of it.
TORCHVISION = """
__version__ = "0"

class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name

def __getattr__(name):
    if name.startswith("__") or name in ("functional", "io", "ops", "transforms", "v2"):
        raise AttributeError(name)
    return Anything(name, (), {})
"""
PACKAGES = ("", "io", "ops", "transforms", "transforms/functional", "transforms/v2", "transforms/v2/functional")


@pytest.fixture(scope="module")
def vllm():
    """Processes that begin with vLLM imported, one for each call."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        yield pool


@pytest.fixture(scope="module")
def seeing_vllm(tmp_path_factory):
    """Processes in which text can be asked of models that see, one for each call."""
    folder = tmp_path_factory.mktemp("stand_in")
    for package in PACKAGES:
        (folder / "torchvision" / package).mkdir()
        (folder / "torchvision" / package / "__init__.py").write_text(TORCHVISION)
    arguments = {"initializer": import_from, "initargs": (str(folder),)}
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1, **arguments) as pool:
        yield pool


def import_from(folder):
    """Look there before elsewhere, also in processes that this one starts."""
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
