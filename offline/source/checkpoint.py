"""Reading a Hugging Face checkpoint: a directory with config.json and one or more safetensors files.

``open_checkpoint`` is the one validation path. It reads every header and no tensor, so a damaged checkpoint is refused
at once, and afterwards every tensor is known by file, place, shape and dtype. Quantized weights appear as the bfloat16
tensors that they mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any

import torch

from alphaq_vllm.format import QUANT_METHOD, TensorSpec
from offline.messages import reason, some
from offline.source.beside import REPLACED, Beside, Sidecar, hub_patterns, look_beside, still_wanted
from offline.source.header import read_header, refuse_lfs_pointer
from offline.source.hub import NAME
from offline.source.quantized.joining import join_tensors
from offline.source.quantized.method import MODELOPT_CONFIG, Quantization, find_quantization
from offline.source.stored import LazyTensor, StoredTensor

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been found whole.

    ``tensors`` is in the order of the ``files``, then of the data in each file. quantization: that of the weights, if
    any; fault: why they cannot be read as numbers, or nothing. It counts once the family is known, for what looks like
    damage may be the way of a family that is not. family: the type of model whose experts are named like its, if the
    user says so, or said so when it was converted.
    """

    path: Path
    config: Mapping[str, Any]
    files: Sequence[Path]
    tensors: Mapping[str, LazyTensor]
    quantization: Quantization | None = None
    fault: str = ""
    family: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all safetensors files."""
        return sum(file.stat().st_size for file in self.files)

    @cached_property
    def beside(self) -> Beside:
        """What lies beside the weights: what a copy of the model takes along unchanged, and what stays behind."""
        return look_beside(self.path, self.files)

    @property
    def sidecars(self) -> tuple[Sidecar, ...]:
        """Tokenizer, generation settings and the like: what a copy of the model takes along unchanged."""
        return self.beside.taken

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor."""
        return self.tensors[name].spec

    def load(self, name: str) -> torch.Tensor:
        """Read one tensor. Raises OSError if its file has changed since it was opened."""
        return self.tensors[name].load()


def open_checkpoint(model: str, revision: str | None = None, family: str | None = None) -> Checkpoint:
    """Find and check a checkpoint.

    model: a directory, or the name of a model on the Hugging Face Hub, which is then downloaded into the usual cache;
    revision: the branch, tag or commit there, by default the main branch; family: see ``Checkpoint``.
    Raises FileNotFoundError for what is missing and ValueError for what is damaged or contradictory.
    """
    path = _locate(model, revision)
    config = _read_object(path / CONFIG)
    shards = {name: read_header(path / name) for name in _shard_names(path)}
    _check_placement(path, shards)
    stored = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    modelopt = _read_object(path / MODELOPT_CONFIG) if (path / MODELOPT_CONFIG).is_file() else None
    quantization, fault = find_quantization(config, modelopt), ""
    tensors: Mapping[str, LazyTensor] = stored
    if quantization and quantization.readers:
        try:
            tensors = join_tensors(stored, quantization.readers)
        except ValueError as error:
            fault = str(error)
    family = family or _named_family(config)
    checkpoint = Checkpoint(path, config, [path / name for name in shards], tensors, quantization, fault, family)
    for sidecar in checkpoint.sidecars:
        refuse_lfs_pointer(sidecar.path)
    return checkpoint


def _named_family(config: Mapping[str, Any]) -> str | None:
    """What the user named as the family when the checkpoint was converted, if anything."""
    match config.get("quantization_config"):
        # What is no string is refused where the whole is read.
        case {"quant_method": method, "family": str(family)} if method == QUANT_METHOD:
            return family
    return None


def _locate(model: str, revision: str | None) -> Path:
    path = Path(model)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"`revision`: expected a model on the Hugging Face Hub, got the directory {model}")
        return path
    if path.exists():
        raise ValueError(f"{model}: expected a directory with {CONFIG} and safetensors files, got a file")
    if not NAME.fullmatch(model):
        raise FileNotFoundError(f"{model}: no such directory, and not a name on the Hugging Face Hub (owner/model)")
    if revision is not None and not (revision and revision.isprintable()):
        raise ValueError(f"`revision`: expected a branch, a tag or a commit, got {revision!r:.80}")
    try:
        return _download(model, revision)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{model}: no such directory, and the Hugging Face Hub did not deliver it"
            f"{f' at {revision}' if revision else ''}: {reason(error)}"
        ) from error


def _download(model: str, revision: str | None) -> Path:
    """The snapshot of a model in the cache: without the Hub what is there of it, which may lack files beside the
    weights.
    """
    from huggingface_hub import snapshot_download

    wanted, unwanted = hub_patterns()
    wanted, unwanted = ["*.safetensors", *wanted, *REPLACED], [*unwanted, "consolidated*"]
    try:
        path = Path(snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
        # Code may import other code, so this can take several rounds.
        before: list[str] = []
        while (more := still_wanted(path)) and more != before:
            snapshot_download(model, revision=path.name, allow_patterns=list(map(escape, more)), ignore_patterns=[])
            before = more
        return path
    except FileNotFoundError as error:
        if place := getattr(error, "snapshot_path", None):
            return Path(place)
        raise


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: expected the directory of a Hugging Face checkpoint")
    refuse_lfs_pointer(path)
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}: download the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}: download the file again")
    return content


def _shard_names(path: Path) -> list[str]:
    if (path / INDEX).exists():
        names = sorted(set(_weight_map(path).values()))
        if (path / SINGLE).exists() and SINGLE not in names:
            raise ValueError(f"{path}: both {SINGLE} and {INDEX} are present: remove the one that is out of date")
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{path}: {INDEX} names {some(missing)}, which is missing: download it again")
        return names
    if (path / SINGLE).is_file():
        return [SINGLE]
    if (path / SINGLE).exists() or (path / SINGLE).is_symlink():
        raise FileNotFoundError(
            f"{path / SINGLE}: expected a file, got a directory or a link that leads to none: download it again"
        )
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if any(name.startswith("consolidated") for name in found):
        raise FileNotFoundError(
            f"{path}: expected {SINGLE} or {INDEX}, got only {some(found)}: Mistral's own files, whose tensors have "
            "other names: take the files model*.safetensors of the same repository, or those of a copy of the model "
            "for transformers"
        )
    if found:
        raise FileNotFoundError(f"{path}: expected {SINGLE} or {INDEX}, got only {some(found)}: download the index")
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise ValueError(
            f"{path}: expected safetensors weights, got only pickled ones ({some(pickles)}), which can run code when "
            "read: save the model with save_pretrained of transformers first"
        )
    raise FileNotFoundError(f"{path}: no weights: expected {SINGLE} or {INDEX}")


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = _read_object(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{path / INDEX}: weight_map: expected an object with one file per tensor, got {weight_map!r:.80}"
        )
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise ValueError(
                f"{path / INDEX}: weight_map[{tensor!r}]: expected the name of a safetensors file in this directory, "
                f"got {name!r:.80}"
            )
    return weight_map


def _check_placement(path: Path, shards: Mapping[str, Mapping[str, StoredTensor]]) -> None:
    """Every tensor is in one shard, and that is the one that the index names."""
    places: dict[str, list[str]] = {}
    for shard, tensors in shards.items():
        for name in tensors:
            places.setdefault(name, []).append(shard)
    for name, found in places.items():
        if len(found) > 1:
            raise ValueError(f"{path}: tensor {name!r}: expected it in one shard, got {some(found)}")
    if not (path / INDEX).exists():
        return
    weight_map = _weight_map(path)
    for name, (shard,) in places.items():
        if name not in weight_map:
            raise ValueError(f"{path}: {shard} has tensor {name!r}, which {INDEX} does not name: download both again")
    for name, shard in weight_map.items():
        if name not in places:
            raise ValueError(f"{path}: {INDEX} names tensor {name!r}, which {shard} lacks: download both again")
        if places[name] != [shard]:
            raise ValueError(f"{path}: {INDEX} places tensor {name!r} in {shard}, but {places[name][0]} has it")
