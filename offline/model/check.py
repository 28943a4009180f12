"""Whether a checkpoint holds all that its model needs: every tensor, of the right shape, with numbers in it.

The names and shapes come from transformers' own model, those of the experts from the table of families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from alphaq_vllm.format import TensorSpec
from offline.messages import some
from offline.model.skeleton import needs
from offline.progress import Progress
from offline.source.architectures import text_config
from offline.source.checkpoint import Checkpoint
from offline.source.families import SOURCE_DTYPES, Experts, load_matrix
from offline.source.stored import StoredTensor
from offline.threads import one_thread

# What is greater overflows float32 as soon as a few products with it are added.
LIMIT = 2.0**63
_READ_BYTES = 2**22
_WAY_OUT = "download the source again or correct config.json"


@dataclass(frozen=True)
class Found:
    """What a checkpoint holds: tensors that the model ``needed``, and ``extra`` ones.

    known: whether transformers knows the type of model, without which all are taken for needed.
    """

    needed: tuple[str, ...]
    extra: tuple[str, ...] = ()
    known: bool = True

    def __str__(self) -> str:
        """What a user should know of it, or nothing.

        >>> str(Found(("a",), ("b",)))
        '1 tensors that the model does not need, kept as they are: b'
        """
        if not self.known:
            return "transformers does not know the type of model: only the experts were checked to be complete"
        if self.extra:
            return f"{len(self.extra)} tensors that the model does not need, kept as they are: {some(self.extra)}"
        return ""


def check_source(source: Checkpoint, experts: Experts) -> Found:
    """Check the names, shapes and dtypes of a source; experts: all that were found in it. Reads no tensor.

    Raises ValueError for a config that transformers cannot build, and for tensors that are missing or of another shape
    than config.json implies.
    """
    gates: dict[str, tuple[int, int]] = {}
    for matrix in experts.matrices:
        gates.setdefault(matrix.module, matrix.shape)
    specs = {name: source.spec(name) for name in source.tensors}
    return check_tensors(source, specs, gates, {matrix.tensor for matrix in experts.matrices})


def check_tensors(
    checkpoint: Checkpoint,
    specs: Mapping[str, TensorSpec],
    gates: Mapping[str, tuple[int, int]],
    others: set[str],
) -> Found:
    """Check a checkpoint whose experts are complete; raises as ``check_source`` does.

    specs: what it holds, by the source's names; gates: the shape of an expert's gate in each module; others: names of
    what is known and complete besides.
    """
    needed = needs(checkpoint)
    if needed is None:
        return Found(tuple(specs), known=False)
    present = [next((name for name in names if name in specs), None) for names in needed.tensors]
    missing = [names[0] for names, name in zip(needed.tensors, present, strict=True) if name is None]
    missing += [module for module in needed.modules if module not in gates]
    if missing:
        raise ValueError(
            f"{checkpoint.path}: expected the tensors that config.json implies, got none of {some(missing)}: {_WAY_OUT}"
        )
    for names, shape in needed.tensors.items():
        for name in names:
            if name in specs:
                _check_spec(checkpoint.config, name, shape, specs[name])
    for module, gate in needed.modules.items():
        _check_shape(checkpoint.config, f"{module}: gate of an expert", gate, gates[module])
    known = others.union(*needed.tensors)
    names = tuple(name for name in specs if name in known)
    return Found(names, tuple(name for name in specs if name not in known))


def _check_spec(config: Mapping[str, Any], name: str, shape: tuple[int, ...], got: TensorSpec) -> None:
    if got.dtype not in (*SOURCE_DTYPES, torch.float64):
        raise ValueError(f"{name}: expected bfloat16, float16 or float32, got {got.dtype}: {_WAY_OUT}")
    _check_shape(config, name, shape, got.shape)


def _check_shape(config: Mapping[str, Any], name: str, shape: tuple[int, ...], got: tuple[int, ...]) -> None:
    if got == shape:
        return
    sizes = [size for size, other in zip(shape, got, strict=False) if size != other] or list(shape)
    keys = [key for size in dict.fromkeys(sizes) for key in _keys(text_config(config), size)]
    says = f" as {some(keys)} in config.json say" if keys else " as config.json says"
    raise ValueError(f"{name}: expected shape {shape}{says}, got {got}: {_WAY_OUT}")


def _keys(config: Mapping[str, Any], size: int) -> list[str]:
    """The fields of a config that make a size: of its value, or else two whose product it is."""
    numbers = {key: value for key, value in config.items() if type(value) is int and value > 1}
    alone = [f"{key}={value}" for key, value in numbers.items() if value == size and not key.endswith("_id")]
    pairs = combinations(numbers.items(), 2)
    return alone or [f"{a}={m} times {b}={n}" for (a, m), (b, n) in pairs if m * n == size and "head" in a + b]


@one_thread()
def check_values(source: Checkpoint, found: Found, experts: Experts) -> None:
    """Check that all numbers that a source needs can be computed with, part of a tensor in memory at a time.

    Raises ValueError, naming the tensor or the expert's matrix and the place, for NaN, infinity and what makes float32
    overflow.
    """
    names = [name for name in found.needed if source.spec(name).dtype.is_floating_point]
    with Progress("check", sum(source.tensors[name].nbytes for name in names)) as progress:
        for name in names:
            tensor = source.tensors[name]
            parts = tensor.chunks(_READ_BYTES) if isinstance(tensor, StoredTensor) else (tensor.load(),)
            # Negated, because NaN is neither greater nor less.
            if not all(low > -LIMIT and high < LIMIT for low, high in map(_extremes, parts)):
                _refuse(source, name, experts)
            progress.advance(tensor.nbytes)


def _extremes(part: torch.Tensor) -> tuple[float, float]:
    if not part.numel():
        return 0.0, 0.0
    low, high = (part.float() if part.dtype.itemsize == 1 else part).aminmax()
    return float(low), float(high)


def _refuse(source: Checkpoint, name: str, experts: Experts) -> None:
    matrices = [matrix for matrix in experts.matrices if matrix.tensor == name]
    tensors = ((f"{matrix.name}.weight", load_matrix(source, matrix)) for matrix in matrices)
    for where, tensor in tensors if matrices else [(name, source.tensors[name].load_float32())]:
        bad = ~(tensor.abs() < LIMIT)
        if not bool(bad.any()):
            continue
        place = [int(i) for i in bad.nonzero()[0]]
        value, count = float(tensor[tuple(place)]), int((~tensor.isfinite()).sum())
        what = f"{count} NaN or infinite" if count else f"{int(bad.sum())} that make float32 overflow"
        raise ValueError(
            f"{where}: expected finite weights, got {what}, the first {value:.3g} at {place}: the source is damaged: "
            "download it again"
        )
