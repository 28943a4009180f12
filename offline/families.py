"""Which tensors of a model are the matrices of its routed experts.

``FAMILIES`` is the whole knowledge about architectures: to support another one, add a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from offline.checkpoint import Checkpoint, some

SOURCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Family:
    """How an architecture names its routed experts.

    module: pattern of the modules of experts; projections: gate, up and down, in this order;
    num_experts_keys: where config.json may say how many experts a module has.
    """

    module: str
    projections: tuple[str, str, str]
    num_experts_keys: tuple[str, ...]


_MLP_EXPERTS = r"model\.layers\.\d+\.mlp\.experts"
_GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")

FAMILIES = {
    "mixtral": Family(r"model\.layers\.\d+\.block_sparse_moe\.experts", ("w1", "w3", "w2"), ("num_local_experts",)),
    "qwen2_moe": Family(_MLP_EXPERTS, _GATE_UP_DOWN, ("num_experts",)),
    # transformers 5 writes Qwen3's number under Mixtral's key.
    "qwen3_moe": Family(_MLP_EXPERTS, _GATE_UP_DOWN, ("num_experts", "num_local_experts")),
    "olmoe": Family(_MLP_EXPERTS, _GATE_UP_DOWN, ("num_experts",)),
    "deepseek_v2": Family(_MLP_EXPERTS, _GATE_UP_DOWN, ("n_routed_experts",)),
    "deepseek_v3": Family(_MLP_EXPERTS, _GATE_UP_DOWN, ("n_routed_experts",)),
}


@dataclass(frozen=True)
class ExpertMatrix:
    """One projection of one expert; ``shape`` is ``(out_features, in_features)``."""

    module: str
    expert: int
    projection: str
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        """The name that statistics, bit maps and stored tensors go by."""
        return f"{self.module}.{self.expert}.{self.projection}"

    @property
    def tensor(self) -> str:
        """The source's tensor."""
        return f"{self.name}.weight"

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Experts:
    """All routed experts of a model, by layer, expert and projection (gate, up, down)."""

    model_type: str
    num_experts: int
    matrices: tuple[ExpertMatrix, ...]

    @property
    def modules(self) -> list[str]:
        """The modules of experts, one per MoE layer, in the order of the layers."""
        return list(dict.fromkeys(matrix.module for matrix in self.matrices))

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(matrix.numel for matrix in self.matrices)


def find_experts(source: Checkpoint) -> Experts:
    """Find the routed experts of a checkpoint that is to be converted, and check that they are complete.

    Raises ValueError for a model that is quantized already, dense or unknown, for a number of experts that disagrees
    with the config, for missing or unexpected tensors, and for impossible shapes and dtypes.
    """
    quantization = source.config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ValueError(
            f"{source.path}: already quantized (quant_method {method!r}): "
            "expected weights in bfloat16, float16 or float32: convert the original model"
        )
    family = family_of(source)
    expected = num_experts(source.config, family)
    modules = _modules(source, family)
    matrices = [
        matrix for module in modules for matrix in _module_matrices(source, family, module, modules[module], expected)
    ]
    check_shapes(matrices, family, source.config)
    return Experts(str(source.config["model_type"]), expected, tuple(matrices))


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint. Raises ValueError for a dense model and for an unknown architecture."""
    model_type = checkpoint.config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if not any(".experts." in name for name in checkpoint.tensors):
        raise ValueError(
            f"{checkpoint.path}: model_type {model_type!r} is a dense model, without routed experts: "
            "expected a Mixture-of-Experts model"
        )
    raise ValueError(f"{checkpoint.path}: model_type: expected one of {', '.join(FAMILIES)}, got {model_type!r:.80}")


def num_experts(config: Mapping[str, Any], family: Family) -> int:
    """The number of routed experts in each module. Raises ValueError if the config does not say it."""
    keys = [key for key in family.num_experts_keys if config.get(key) is not None]
    if not keys:
        raise ValueError(f"config.json: expected {' or '.join(family.num_experts_keys)}, got none")
    number = config[keys[0]]
    if type(number) is not int or number < 1:
        raise ValueError(f"config.json: {keys[0]}: expected a number of experts from 1 up, got {number!r:.80}")
    return number


def check_shapes(matrices: Iterable[ExpertMatrix], family: Family, config: Mapping[str, Any]) -> None:
    """Raise ValueError unless gate and up of all experts in a module agree, and down is their transpose."""
    hidden_size = config.get("hidden_size")
    shapes: dict[str, tuple[int, int]] = {}
    for matrix in matrices:
        out_features, in_features = shape = matrix.shape
        if matrix.projection == family.projections[2]:
            shape = in_features, out_features
        if shape[1] != hidden_size:
            raise ValueError(f"{matrix.name}: expected hidden_size={hidden_size} as one side, got shape {matrix.shape}")
        first = shapes.setdefault(matrix.module, shape)
        if shape != first:
            raise ValueError(
                f"{matrix.name}: expected an intermediate size of {first[0]} as in the module's other matrices, "
                f"got {shape[0]}"
            )


def _modules(source: Checkpoint, family: Family) -> dict[str, dict[str, str]]:
    """The tensors of each module of experts, by what follows the module's name."""
    pattern = re.compile(rf"({family.module})\.(.+)")
    modules: dict[str, dict[str, str]] = {}
    for name in source.tensors:
        if match := pattern.fullmatch(name):
            modules.setdefault(match[1], {})[match[2]] = name
    if not modules:
        raise ValueError(f"{source.path}: expected tensors named {family.module}, got none: the model has no experts")
    return dict(sorted(modules.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]))


def _module_matrices(
    source: Checkpoint, family: Family, module: str, tensors: Mapping[str, str], expected: int
) -> list[ExpertMatrix]:
    names = [(e, p) for e in range(expected) for p in family.projections]
    missing = [f"{e}.{p}.weight" for e, p in names if f"{e}.{p}.weight" not in tensors]
    unknown = sorted(set(tensors) - {f"{e}.{p}.weight" for e, p in names})
    if missing:
        raise ValueError(
            f"{module}: expected {expected} experts of {', '.join(family.projections)} as config.json says, "
            f"got none of {some(missing)}" + (f", but {some(unknown)}" if unknown else "")
        )
    if unknown:
        raise ValueError(f"{module}: expected {expected} experts as config.json says, got also {some(unknown)}")
    return [ExpertMatrix(module, e, p, _shape(source, f"{module}.{e}.{p}.weight")) for e, p in names]


def _shape(source: Checkpoint, name: str) -> tuple[int, int]:
    spec = source.spec(name)
    if spec.dtype not in SOURCE_DTYPES or len(spec.shape) != 2 or 0 in spec.shape:
        raise ValueError(
            f"{name}: expected a matrix in bfloat16, float16 or float32, got {spec.dtype} of shape {spec.shape}"
        )
    return spec.shape[0], spec.shape[1]
