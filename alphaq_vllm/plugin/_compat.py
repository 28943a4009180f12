"""Every name that the plugin takes from vLLM, and what differs between vLLM's versions.

The rest of the plugin imports vLLM through this module alone, so that a version without some interface is one error
that says so, raised before anything is loaded; but for the model in ``gpt_oss``, which is imported when it is served.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import vllm

OLDEST, NEWEST = (0, 26), (0, 33)
RANGE = f"vLLM {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"

try:
    from vllm.config import LoadConfig, ModelConfig, get_current_vllm_config
    from vllm.logger import init_logger
    from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, RoutedExperts
    from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEParallelConfig
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
    from vllm.model_executor.layers.fused_moe.modular_kernel import (
        FusedMoEActivationFormat,
        FusedMoEExpertsModular,
        FusedMoEKernel,
    )
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
    from vllm.model_executor.layers.linear import (
        LinearBase,
        LinearMethodBase,
        UnquantizedLinearMethod,
        register_weight_loader_v2_supported_method,
    )
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.model_executor.models.utils import WeightsMapper
    from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
    from vllm.model_executor.utils import set_weight_attrs
    from vllm.platforms import current_platform
except ImportError as error:
    raise ImportError(
        f"alphaq-vllm needs {RANGE}, got vLLM {vllm.__version__} ({error}): install one of those versions"
    ) from error

__all__ = [
    "FUSED_MOE_UNQUANTIZED_CONFIG",
    "CompressedTensorsWNA16",
    "FusedMoEActivationFormat",
    "FusedMoEConfig",
    "FusedMoEExpertsModular",
    "FusedMoEKernel",
    "FusedMoEMethodBase",
    "GroupQuantScaleParameter",
    "LinearBase",
    "LinearMethodBase",
    "ModelRegistry",
    "PackedvLLMParameter",
    "ParallelLMHead",
    "QuantizationConfig",
    "QuantizeMethodBase",
    "RoutedExperts",
    "TopKWeightAndReduceNoOP",
    "UnquantizedLinearMethod",
    "WeightsMapper",
    "check_interface",
    "check_version",
    "current_platform",
    "get_current_vllm_config",
    "local_expert_ids",
    "logger",
    "maybe_make_prepare_finalize",
    "num_decoder_layers",
    "register_quantization_config",
    "register_weight_loader_v2_supported_method",
    "set_weight_attrs",
    "weight_loader",
    "weights_asked_for",
]

# vLLM shows messages of loggers below its own only.
logger = init_logger("vllm.alphaq")

# What the plugin calls, overrides or reads beyond the names above: parameters of functions, fields of dataclasses and
# attributes of classes.
INTERFACE: dict[Any, tuple[str, ...]] = {
    CompressedTensorsWNA16: ("strategy", "num_bits", "group_size", "symmetric", "layer_name"),
    ExpertMapManager: ("expert_map", "map_global_to_local"),
    FusedMoEConfig: (
        "activation", "experts_per_token", "has_bias", "hidden_dim", "in_dtype", "intermediate_size",
        "intermediate_size_per_partition", "is_lora_enabled", "moe_parallel_config", "num_experts", "swiglu_alpha",
        "swiglu_beta", "swiglu_limit",
    ),
    FusedMoEExpertsModular.apply: (
        "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "apply_router_weight_on_input"
    ),
    FusedMoEExpertsModular.moe_problem_size: ("a1", "w1", "w2", "topk_ids"),
    FusedMoEExpertsModular.workspace_shapes: ("M", "N", "K"),
    FusedMoEKernel: ("prepare_finalize", "fused_experts"),
    FusedMoEKernel.apply: (
        "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "global_num_experts", "expert_map",
        "apply_router_weight_on_input", "shared_experts", "shared_experts_input",
    ),
    FusedMoEMethodBase.apply: (
        "layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input"
    ),
    FusedMoEMethodBase.create_weights: (
        "layer", "num_experts", "hidden_size", "intermediate_size_per_partition", "params_dtype"
    ),
    maybe_make_prepare_finalize: ("moe", "quant_config", "allow_new_interface"),
    LinearMethodBase.apply: ("layer", "x", "bias"),
    QuantizationConfig: ("maybe_update_config",),
    QuantizationConfig.get_quant_method: ("layer", "prefix"),
    FusedMoEParallelConfig: (
        "all2all_backend", "dp_size", "enable_eplb", "is_sequence_parallel", "pcp_size", "tp_rank", "tp_size", "use_ep"
    ),
    RoutedExperts: ("expert_map",),
    ModelRegistry.register_model: ("model_arch", "model_cls"),
    WeightsMapper: ("apply_dict",),
}  # fmt: skip


def check_version(version: str | None = None) -> None:
    """Warn, once, if this version of vLLM (by default the one installed) is outside the tested range."""
    version = vllm.__version__ if version is None else version
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not OLDEST <= (int(numbers[1]), int(numbers[2])) <= NEWEST:
        logger.warning_once(
            "alphaq-vllm is tested with %s, this is vLLM %s: if something fails, install a version from that range.",
            RANGE,
            version,
        )


def check_interface() -> None:
    """Raise ImportError if vLLM lacks something that the plugin calls, overrides or reads."""
    for owner, names in INTERFACE.items():
        missing = [name for name in names if name not in _names(owner)]
        if missing:
            raise ImportError(
                f"alphaq-vllm needs {RANGE}, got vLLM {vllm.__version__}, whose {owner.__qualname__} has no "
                f"{' and no '.join(missing)}: install one of those versions"
            )


def _names(owner: Any) -> set[str]:
    """What a function or class offers: its parameters, and for a class its fields and attributes too."""
    names = set(inspect.signature(owner).parameters)
    if not inspect.isclass(owner):
        return names
    fields = {field.name for field in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else set()
    return names | fields | set(dir(owner))


def local_expert_ids(manager: ExpertMapManager, num_experts: int) -> list[int]:
    """Global ids of this rank's experts, by local id; ``num_experts``: of the layer, on all ranks.

    vLLM has a method for this up to 0.32.
    """
    if manager.expert_map is None:
        return list(range(num_experts))
    expert_map = manager.expert_map.tolist()
    return sorted((e for e in range(num_experts) if expert_map[e] >= 0), key=expert_map.__getitem__)


class AskedWeights(NamedTuple):
    """The value of ``--load-format``, and where the weights lie if not beside the config, else nothing."""

    load_format: str = "auto"
    elsewhere: str = ""


def weights_asked_for() -> AskedWeights:
    """How vLLM was asked to load the model whose quantization config it is making.

    vLLM does not tell the config, so this looks at the variables of vLLM's function that calls it.
    """
    frame = inspect.currentframe()
    while frame is not None:
        load, model = frame.f_locals.get("load_config"), frame.f_locals.get("model_config")
        if isinstance(load, LoadConfig) and isinstance(model, ModelConfig):
            return AskedWeights(str(load.load_format), getattr(model, "model_weights", ""))
        frame = frame.f_back
    return AskedWeights()


def num_decoder_layers() -> int:
    """The number of layers of the model that vLLM serves, while it makes that or the one that drafts for it."""
    return int(get_current_vllm_config().model_config.hf_text_config.num_hidden_layers)


def weight_loader(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """What vLLM calls to load a parameter: ``function``, with these arguments before vLLM's.

    It has a name, because vLLM asks for that when it loads weights again.
    """
    loader = partial(function, *arguments)
    loader.__name__ = function.__name__  # type: ignore[attr-defined]
    return loader
