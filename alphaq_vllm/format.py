"""The AlphaQ checkpoint format: names, shapes, dtypes and configuration. Nothing else defines it.

A quantized weight ``[out_features, in_features]`` is stored as three tensors (see ``matrix_tensors``), and means
``weight_scale * step * (code - zero_point)``. There is a scale for each output row. Each row and group of
``group_size`` consecutive input columns has a step and a zero point, four bits each, in one byte of ``weight_grid``:
see ``packing``, which also has the order of the codes inside ``weight_packed``.

Linear layers outside the experts may be quantized too, for the kernels that vLLM has: ``linear_tensors`` stores them in
the layout of compressed-tensors' ``pack-quantized`` format, signed codes with a scale and no zero point.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

QUANT_METHOD = "alphaq"
FORMAT_VERSION = 1
SUPPORTED_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
SUPPORTED_GROUP_SIZES = (32, 64, 128)
LINEAR_BITS = (4, 8)
# The field of config.json in which transformers looks for the file of weights, and what stands there. A transformers
# that does not know the format would warn and make up the experts; this is no file, so it stops and repeats it.
WEIGHTS_FILE = "transformers_weights"
NO_WEIGHTS_FILE = "import alphaq_vllm.transformers before from_pretrained"

PACKED, SCALE, GRID = "weight_packed", "weight_scale", "weight_grid"
PACKED_DTYPE = torch.int32
# The range of any weight.
SCALE_DTYPE = torch.bfloat16
GRID_DTYPE = torch.uint8

# What each family calls the projections of an expert, and the shard id that vLLM gives them.
SHARD_IDS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "w1": "w1", "w3": "w3", "w2": "w2"}
# Of experts without a gate, vLLM's first shard is up.
UNGATED_SHARD_IDS = {"up_proj": "w1", "down_proj": "w2"}

BitMap = Mapping[str, Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk and in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


def matrix_tensors(out_features: int, in_features: int, num_bits: int, group_size: int) -> dict[str, TensorSpec]:
    """The tensors that store one matrix, by name suffix.

    A slice of rows, or of whole groups of columns, of each tensor stores that slice of the matrix; columns share the
    scales.

    >>> {name: spec.shape for name, spec in matrix_tensors(256, 512, 3, 128).items()}
    {'weight_packed': (256, 48), 'weight_scale': (256, 1), 'weight_grid': (256, 4)}

    Raises ValueError if ``in_features`` is not a multiple of ``group_size``.
    """
    codes, groups = linear_tensors(out_features, in_features, num_bits, group_size).values()
    return {
        PACKED: codes,
        SCALE: TensorSpec((out_features, 1), SCALE_DTYPE),
        GRID: TensorSpec(groups.shape, GRID_DTYPE),
    }


def linear_tensors(out_features: int, in_features: int, num_bits: int, group_size: int) -> dict[str, TensorSpec]:
    """The tensors that store one linear layer, by name suffix.

    >>> {name: spec.shape for name, spec in linear_tensors(256, 512, 4, 128).items()}
    {'weight_packed': (256, 64), 'weight_scale': (256, 4)}

    Raises ValueError if ``in_features`` is not a multiple of ``group_size``.
    """
    if in_features % group_size:
        raise ValueError(
            f"in_features={in_features} is not divisible by group_size={group_size}: "
            f"choose one of the group sizes {SUPPORTED_GROUP_SIZES} that divides it"
        )
    return {
        PACKED: TensorSpec((out_features, in_features * num_bits // 32), PACKED_DTYPE),
        SCALE: TensorSpec((out_features, in_features // group_size), SCALE_DTYPE),
    }


def shard_ids(projections: Iterable[str]) -> dict[str, str]:
    """The shard ids of an expert's projections, by the checkpoint's names for them.

    >>> shard_ids(("up_proj", "down_proj"))
    {'up_proj': 'w1', 'down_proj': 'w2'}

    Raises ValueError unless they are gate, up and down, or up and down.
    """
    names = list(projections)
    ids = UNGATED_SHARD_IDS if set(names) == set(UNGATED_SHARD_IDS) else SHARD_IDS
    found = {name: ids.get(name, "") for name in names}
    if ids is SHARD_IDS and sorted(found.values()) != ["w1", "w2", "w3"]:
        raise ValueError(
            "expected gate_proj, up_proj and down_proj (or w1, w3 and w2), or up_proj and down_proj of experts without "
            f"a gate, got {', '.join(map(str, names)) or 'none':.80}"
        )
    return found


def stored_bits_per_weight(num_bits: float, group_size: int) -> float:
    """Bits on disk and in memory for one weight: its code and its share of a grid, without the scale of its row.

    >>> stored_bits_per_weight(3.5, 128)
    3.5625
    """
    return num_bits + 8 * GRID_DTYPE.itemsize / group_size


@dataclass(frozen=True)
class LinearFormat:
    """How a linear layer is stored."""

    num_bits: int
    group_size: int


@dataclass(frozen=True)
class AlphaQSpec:
    """The ``quantization_config`` of a checkpoint: which matrices are quantized, and how.

    ``num_bits[module][projection][expert]`` is a width, where ``module`` is the name of a module of routed experts
    (``model.layers.0.mlp.experts``) and ``projection`` the checkpoint's name for one of its matrices
    (``gate_proj``). The matrix's tensors are ``{module}.{expert}.{projection}.{suffix}``. A module that is not
    listed is not quantized. ``linear`` does the same for linear layers outside the experts, by the module's name
    (``model.layers.0.self_attn.q_proj``). ``family`` is the type of model whose names the experts have, where the user
    named one; serving does not need it.
    """

    group_size: int
    num_bits: BitMap
    linear: Mapping[str, LinearFormat] = field(default_factory=dict)
    family: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: the widths of one projection are a string with one digit per expert, linear layers are
        listed by format, and ``linear`` is absent if there are none, as is ``family``.
        """
        modules: dict[LinearFormat, list[str]] = {}
        for module, linear_format in self.linear.items():
            modules.setdefault(linear_format, []).append(module)
        linear = [{**asdict(linear_format), "modules": names} for linear_format, names in modules.items()]
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "group_size": self.group_size,
            "num_bits": {
                module: {name: "".join(map(str, bits)) for name, bits in projections.items()}
                for module, projections in self.num_bits.items()
            },
            **({"linear": linear} if linear else {}),
            **({"family": self.family} if self.family else {}),
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AlphaQSpec:
        """Parse and check the JSON form.

        Raises ValueError for another method, a newer version, unknown or missing keys, and impossible values.
        """
        where = "quantization_config"
        if not isinstance(config, Mapping):
            raise ValueError(f"{where}: expected an object, got {type(config).__name__}")
        if config.get("quant_method") != QUANT_METHOD:
            raise ValueError(f"{where}.quant_method: expected {QUANT_METHOD!r}, got {config.get('quant_method')!r}")
        version = config.get("format_version")
        if type(version) is int and version > FORMAT_VERSION:
            raise ValueError(
                f"{where}.format_version: this alphaq-vllm reads up to {FORMAT_VERSION}, got {version}: "
                "upgrade alphaq-vllm"
            )
        if type(version) is not int or version != FORMAT_VERSION:
            raise ValueError(
                f"{where}.format_version: expected {FORMAT_VERSION}, got {version!r}: convert the source again"
            )
        _require_keys(where, config, ("quant_method", "format_version", "group_size", "num_bits"), ("linear", "family"))
        group_size = _parse_choice(f"{where}.group_size", config["group_size"], SUPPORTED_GROUP_SIZES)
        modules = config["num_bits"]
        if not isinstance(modules, Mapping) or not modules:
            raise ValueError(
                f"{where}.num_bits: expected an object with one entry per module of experts, got {modules!r:.80}"
            )
        num_bits = {m: _parse_projections(f"{where}.num_bits.{m}", p) for m, p in modules.items()}
        linear = _parse_linear(f"{where}.linear", config["linear"]) if "linear" in config else {}
        family = config.get("family")
        if family is not None and not isinstance(family, str):
            raise ValueError(f"{where}.family: expected a type of model, got {family!r:.80}")
        return cls(group_size, num_bits, linear, family)


def _require_keys(where: str, config: Mapping[str, Any], keys: Iterable[str], optional: Iterable[str] = ()) -> None:
    missing, unknown = set(keys) - set(config), set(config) - set(keys) - set(optional)
    if missing or unknown:
        raise ValueError(
            f"{where}: expected the keys {sorted(keys)}, got missing {sorted(missing)} and unknown {sorted(unknown)}"
        )


def _parse_projections(where: str, projections: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(projections, Mapping):
        raise ValueError(f"{where}: expected an object with the widths of each projection, got {projections!r:.80}")
    try:
        shard_ids(projections)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    parsed = {}
    for name, digits in projections.items():
        if not isinstance(digits, str) or not digits or set(digits) - set("12345678"):
            raise ValueError(f"{where}.{name}: expected one digit from 1 to 8 per expert, got {digits!r:.80}")
        parsed[name] = tuple(map(int, digits))
    if len({len(bits) for bits in parsed.values()}) != 1:
        raise ValueError(
            f"{where}: expected the same number of experts in every projection, "
            f"got { {name: len(bits) for name, bits in parsed.items()} }"
        )
    return parsed


def _parse_choice(where: str, value: Any, choices: tuple[int, ...]) -> int:
    if type(value) is not int or value not in choices:
        raise ValueError(f"{where}: expected one of {choices}, got {value!r:.80}")
    return value


def _parse_linear(where: str, groups: Any) -> dict[str, LinearFormat]:
    if not isinstance(groups, list) or not groups:
        raise ValueError(
            f"{where}: expected a list of objects with num_bits, group_size and modules, got {groups!r:.80}"
        )
    parsed: dict[str, LinearFormat] = {}
    for i, group in enumerate(groups):
        here = f"{where}[{i}]"
        if not isinstance(group, Mapping):
            raise ValueError(f"{here}: expected an object with num_bits, group_size and modules, got {group!r:.80}")
        _require_keys(here, group, ("num_bits", "group_size", "modules"))
        linear_format = LinearFormat(
            _parse_choice(f"{here}.num_bits", group["num_bits"], LINEAR_BITS),
            _parse_choice(f"{here}.group_size", group["group_size"], SUPPORTED_GROUP_SIZES),
        )
        modules = group["modules"]
        if not isinstance(modules, list) or not modules or not all(isinstance(name, str) and name for name in modules):
            raise ValueError(f"{here}.modules: expected a list of names of linear layers, got {modules!r:.80}")
        for name in modules:
            if name in parsed:
                raise ValueError(f"{here}.modules: expected each linear layer once, got {name!r} again")
            parsed[name] = linear_format
    return parsed
