"""Which method has quantized a checkpoint, by its config, and how its tensors are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from offline.source.quantized import mimo
from offline.source.quantized.fp4 import read_deepseek_fp4, read_mxfp4, read_nvfp4, read_packed_fp4
from offline.source.quantized.fp8 import Fp8Reader
from offline.source.quantized.joining import Reader
from offline.source.quantized.packed import PackedReader, TransposedReader

# Where ModelOpt before 0.31 keeps what newer versions have in config.json.
MODELOPT_CONFIG = "hf_quant_config.json"
READ = "fp8, fbgemm_fp8, mxfp4, compressed-tensors, modelopt, awq, gptq, auto-round or quark"

_KEYS = ("quantization_config", "compression_config")
# How scales are called after the weight's name.
_INVERSE, _PLAIN, _FUSED = "_scale_inv", "_scale", "_weight_scale"


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized.

    method: as its config calls it; readers: for its kinds of tensors, none if this project does not read it;
    rounded: whether it is always made from a model that was published with more bits.
    """

    method: str
    readers: tuple[Reader, ...] = ()
    rounded: bool = False


def find_quantization(config: Mapping[str, Any], modelopt: Mapping[str, Any] | None = None) -> Quantization | None:
    """The quantization that a config declares, also in one of its parts, or None.

    modelopt: the contents of ``hf_quant_config.json``, which counts if the config declares none.
    """
    declared = next((part[key] for part in _parts(config) for key in _KEYS if part.get(key)), None)
    if declared is None and modelopt is not None:
        declared = {"quant_method": "modelopt", **_mapping(modelopt.get("quantization"))}
    if declared is None:
        return None
    if not isinstance(declared, Mapping):
        return Quantization(str(declared))
    method = str(declared.get("quant_method"))
    read = _METHODS.get(method.replace("_", "-"))
    quantization = read(method, declared) if read else Quantization(method)
    if quantization.readers and config.get("model_type") == mimo.MODEL_TYPE:
        return replace(quantization, readers=(mimo.shared_attention(config), *quantization.readers))
    return quantization


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what it says of quantization, also in its parts."""
    return {
        key: without_quantization(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _KEYS
    }


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in _KEYS:
            yield from _parts(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _block(value: Any) -> tuple[int, int] | None:
    """Rows and columns, from a list or such as ``128x128``."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d{1,6})x(\d{1,6})", value)):
        value = [int(match[1]), int(match[2])]
    match value:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    return None


def _fp8(method: str, declared: Mapping[str, Any]) -> Quantization:
    block = _block(declared.get("weight_block_size"))
    fp8 = Fp8Reader((_INVERSE, _PLAIN, _FUSED), (block,) if block else (), others=block is None)
    return Quantization(method, (read_deepseek_fp4, fp8))


def _fbgemm(method: str, declared: Mapping[str, Any]) -> Quantization:
    return Quantization(method, (Fp8Reader((_PLAIN,), transposed=True),))


def _mxfp4(method: str, declared: Mapping[str, Any]) -> Quantization:
    return Quantization(method, (read_mxfp4,))


def _compressed_tensors(method: str, declared: Mapping[str, Any]) -> Quantization:
    groups = [_mapping(group) for group in _mapping(declared.get("config_groups")).values()]
    formats = {str(part.get("format")) for part in (declared, *groups)}
    weights = [_mapping(group.get("weights")) for group in groups]
    sparsity = _mapping(declared.get("sparsity_config")).get("format", "dense")
    if sparsity != "dense" or any("24" in name for name in formats):
        return Quantization(f"{method}, {', '.join(sorted({*formats, str(sparsity)} - {'None', 'dense'}))}")
    sizes = [_block([1, weight.get("group_size")]) if weight.get("strategy") == "group" else None for weight in weights]
    blocks = [_block(weight.get("block_structure")) or size for weight, size in zip(weights, sizes, strict=True)]
    fp8 = Fp8Reader((_PLAIN,), tuple(filter(None, blocks)), None in blocks, exponents="mxfp8-quantized" in formats)
    schemes = {(bits, size[1] if size else None) for weight, size in zip(weights, sizes, strict=True)
               if type(bits := weight.get("num_bits")) is int and 1 <= bits <= 8}  # fmt: skip
    return Quantization(method, (fp8, PackedReader(tuple(sorted(schemes, key=str))), read_packed_fp4))


def _modelopt(method: str, declared: Mapping[str, Any]) -> Quantization:
    algorithm = str(declared.get("quant_algo")).upper()
    match algorithm:
        case "FP8_PB_WO":
            fp8 = Fp8Reader((_PLAIN, _FUSED), ((128, 128),), others=False)
        case "MXFP8":
            fp8 = Fp8Reader((_PLAIN, _FUSED), ((1, 32),), others=False, exponents=True)
        # ``NONE`` is said of a model whose KV cache alone is quantized.
        case "NONE" | "FP8" | "FP8_PER_CHANNEL_PER_TOKEN" | "NVFP4" | "MIXED_PRECISION":
            fp8 = Fp8Reader((_PLAIN, _FUSED))
        case _:
            return Quantization(f"{method}, {algorithm}")
    return Quantization(method, (fp8, read_nvfp4))


def _awq(method: str, declared: Mapping[str, Any]) -> Quantization:
    bits, version = declared.get("bits", declared.get("w_bit")), str(declared.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        return Quantization(f"{method}, {bits} bits, version {version}")
    return Quantization(method, (TransposedReader(4, awq=True),), rounded=True)


def _gptq(method: str, declared: Mapping[str, Any]) -> Quantization:
    bits, form = declared.get("bits"), declared.get("checkpoint_format") or "gptq"
    if type(bits) is not int or bits not in (2, 4, 8) or form not in ("gptq", "gptq_v2"):
        return Quantization(f"{method}, {bits} bits, format {form}")
    # The first format has zero points less one.
    return Quantization(method, (TransposedReader(bits, offset=1 if form == "gptq" else 0),), rounded=True)


def _auto_round(method: str, declared: Mapping[str, Any]) -> Quantization:
    """Exports in GPTQ's or AWQ's layout; without the name of one it is GPTQ's."""
    form = str(declared.get("packing_format") or declared.get("backend") or "auto_round:auto_gptq")
    kind, bits = str(declared.get("data_type", "int")), declared.get("bits")
    layers = [_mapping(layer).get("bits", bits) for layer in _mapping(declared.get("extra_config")).values()]
    # More bits are those of a layer that is not quantized.
    widths = {str(bits), *(str(width) for width in layers if not (type(width) is int and width > 8))}
    if kind == "int" and len(widths) == 1 and ("gptq" in form or "awq" in form):
        read = _gptq(method, {"bits": bits}) if "gptq" in form else _awq(method, {"bits": bits})
        if read.readers:
            return read
    return Quantization(f"{method}, {kind} of {' and '.join(sorted(widths))} bits, format {form}")


def _quark(method: str, declared: Mapping[str, Any]) -> Quantization:
    """Weights in float8 or int8, of which tensors or rows share a scale, or in MXFP4, also in one model."""
    layers = [declared.get("global_quant_config")]
    layers += [config for key in ("layer_quant_config", "layer_type_quant_config")
               for config in _mapping(declared.get(key)).values()]  # fmt: skip
    for weight in filter(None, (_mapping(layer).get("weight") for layer in layers)):
        kind = [_mapping(weight).get(key) for key in ("dtype", "qscheme", "group_size")]
        match kind:
            case ["fp8_e4m3" | "int8", "per_tensor" | "per_channel", _] | ["fp4", "per_group", 32]:
                continue
        return Quantization(f"{method}, weights of {' '.join(str(part) for part in kind if part) or 'several scales'}")
    return Quantization(method, (Fp8Reader((_FUSED, _PLAIN)), read_nvfp4), rounded=True)


_METHODS = {
    "fp8": _fp8,
    "fbgemm-fp8": _fbgemm,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "modelopt-fp4": _modelopt,
    "modelopt-mxfp8": _modelopt,
    "modelopt-mixed": _modelopt,
    "awq": _awq,
    "gptq": _gptq,
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
    "quark": _quark,
}
