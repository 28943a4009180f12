"""Checkpoints that llm-compressor packed, as ordinary ones: transformers does not load all of them itself.

transformers 5.19 decompresses routed experts with symmetric codes only, which AWQ's are not.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file
from torch import Tensor

from offline.messages import some
from offline.source.checkpoint import Checkpoint
from offline.source.recognition import family_of

# What llm-compressor calls the matrices of an expert in every model.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def write_plain(checkpoint: Path, out: Path, source: Checkpoint) -> None:
    """Write the same model with float32 weights, under the names of ``source``, from which it was made.

    Raises ValueError for anything but pack-quantized weights in groups, and unless all tensors of the source are there.
    """
    own_names = dict(zip(PROJECTIONS, family_of(source).projections, strict=True))
    config = json.loads((checkpoint / "config.json").read_text())
    quantization = config.pop("quantization_config")
    weights = quantization["config_groups"]["group_0"]["weights"]
    if quantization["format"] != "pack-quantized" or weights["strategy"] != "group":
        raise ValueError(f"{checkpoint}: expected pack-quantized weights in groups, got {quantization['format']}")
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    for file in checkpoint.glob("tokenizer*"):
        shutil.copy(file, out)
    tensors = {name: t for file in checkpoint.glob("*.safetensors") for name, t in load_file(file).items()}
    plain = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "weight_packed":
            parent, _, projection = module.rpartition(".")
            plain[f"{parent}.{own_names[projection]}.weight"] = _dequantize(tensors, module, weights["num_bits"])
        elif not suffix.startswith("weight_"):
            plain[name] = tensor
    if different := plain.keys() ^ source.tensors.keys():
        raise ValueError(f"{checkpoint}: expected the tensors of {source.path}, got a difference in {some(different)}")
    save_file(plain, out / "model.safetensors", {"format": "pt"})


def _dequantize(tensors: dict[str, Tensor], module: str, num_bits: int) -> Tensor:
    """``scale * (code - zero_point)``, ``[out_features, in_features]`` float32."""
    shape = torch.Size(tensors[f"{module}.weight_shape"].tolist())
    scale = tensors[f"{module}.weight_scale"].float()
    codes = unpack_from_int32(tensors[f"{module}.weight_packed"], num_bits, shape).float()
    packed_zero = tensors.get(f"{module}.weight_zero_point")
    if packed_zero is not None:
        zero = unpack_from_int32(packed_zero, num_bits, scale.shape, packed_dim=0).float()
        codes -= zero.repeat_interleave(shape[1] // scale.shape[1], 1)
    return codes * scale.repeat_interleave(shape[1] // scale.shape[1], 1)
