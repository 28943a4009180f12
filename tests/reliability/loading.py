"""vLLM's own loading of a checkpoint, in this process and without a server."""

import gc
import os
from contextlib import contextmanager
from unittest.mock import patch

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from alphaq_vllm.plugin.files import VERIFY, check_files


@contextmanager
def one_rank(folder):
    """What vLLM wants before it loads a model; folder: for a file by which ranks would meet."""
    empty_cache = torch.accelerator.empty_cache
    if not torch.accelerator.is_available():
        # As vLLM's worker for CPUs does.
        torch.accelerator.empty_cache = lambda: None
    try:
        with set_current_vllm_config(VllmConfig()):
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            init_distributed_environment(1, 0, f"file://{folder}/store", 0, backend)
            ensure_model_parallel_initialized(1, 1)
            # vLLM collects garbage around each loading; what was imported need not be searched every time.
            gc.freeze()
            yield
    finally:
        gc.unfreeze()
        cleanup_dist_env_and_memory()
        torch.accelerator.empty_cache = empty_cache


def engine_config(checkpoint, verify, **arguments):
    """What ``vllm serve`` decides before it starts its workers; verify: whether it compares checksums."""
    # Prefix caching: on a CPU without AMX vLLM turns it off itself for latent attention, but only after it has chosen
    # the blocks of Mamba layers by it, and then refuses them (Kimi-Linear, Ling).
    defaults = {"enforce_eager": True, "max_model_len": 128, "use_tqdm_on_load": False, "enable_prefix_caching": False}
    arguments = {**defaults, **arguments}
    with patch.dict(os.environ, {VERIFY: str(int(verify))}):
        check_files.cache_clear()
        return EngineArgs(str(checkpoint), quantization="alphaq", **arguments).create_engine_config()


def load(checkpoint, verify=False, **arguments):
    """The model that ``vllm serve`` would make of a checkpoint; raises what it would die of.

    Without checksums, unless ``verify``: what loading itself notices.
    """
    config = engine_config(checkpoint, verify, **arguments)
    with set_current_vllm_config(config):
        return get_model(vllm_config=config)


def empty_model(checkpoint, **arguments):
    """The model that a config asks for, before any weight is loaded into it."""
    config = engine_config(checkpoint, verify=False, **arguments)
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        return initialize_model(vllm_config=config)


def reload(model, config, tensors):
    """Load weights again into a model that serves, as vLLM does."""
    initialize_layerwise_reload(model)
    model.load_weights(tensors.items())
    finalize_layerwise_reload(model, config.model_config)


def state(model):
    """All that the model computes with, by name: copies of its parameters and buffers."""
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def same(one, other):
    """Whether two states are equal bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape
        and one[name].dtype == other[name].dtype
        and torch.equal(one[name].flatten().view(torch.uint8), other[name].flatten().view(torch.uint8))
        for name in one
    )
