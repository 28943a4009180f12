"""vLLM in processes of its own, without servers."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest


@pytest.fixture(scope="module")
def vllm():
    """Processes that begin with vLLM imported, one for each call."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        yield pool
