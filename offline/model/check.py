"""Whether a checkpoint holds all that its model needs: every tensor, of the right shape, with numbers in it.

The names and shapes come from transformers' own model, those of the experts from the table of families.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch

from alphaq_vllm.format import TensorSpec
from offline.messages import some
from offline.model.decoder import Decoder
from offline.model.runnable import can_run
from offline.model.skeleton import needs
from offline.progress import Progress
from offline.source.architectures import experts_per_token, text_config
from offline.source.checkpoint import Checkpoint
from offline.source.families import SOURCE_DTYPES, Experts, load_matrix
from offline.source.quantized.joining import PARTS
from offline.source.quantized.tensor import QuantizedTensor
from offline.source.recognition import draft_tensors, family_of, taken_for
from offline.threads import one_thread

# What is greater overflows float32 as soon as it is squared, as norms do.
LIMIT = 2.0**63
_READ_BYTES = 2**22


@dataclass(frozen=True)
class Found:
    """What a checkpoint holds: tensors that the model ``needed``, and ``extra`` ones.

    known: whether transformers knows the type of model, without which all are taken for needed. family: how the family
    was found, where the type of model does not tell it.
    """

    needed: tuple[str, ...]
    extra: tuple[str, ...] = ()
    known: bool = True
    family: str = ""

    def __str__(self) -> str:
        """What a user should know of it, or nothing.

        >>> str(Found(("a",), ("b", "c")))
        '2 tensors that the model does not need, kept as they are: b, c'
        """
        parts = [self.family] if self.family else []
        if not self.known:
            parts.append("what else the model needs is not known: only the experts were checked to be complete")
        if self.extra:
            tensors = "1 tensor" if len(self.extra) == 1 else f"{len(self.extra)} tensors"
            parts.append(f"{tensors} that the model does not need, kept as they are: {some(self.extra)}")
        return "; ".join(parts)


def check_source(source: Checkpoint, experts: Experts) -> Found:
    """Check the names, shapes and dtypes of a source, and that its config lets it run. Reads no tensor.

    experts: all that were found in it.
    Raises ValueError for a config that transformers cannot use, for tensors that are missing or of another shape than
    config.json implies, and for scales of weights that it does not declare to be quantized.
    """
    first: dict[str, tuple[int, int]] = {}
    for matrix in experts.matrices:
        first.setdefault(matrix.module, matrix.shape)
    experts_per_token(source.config)
    specs = {name: source.spec(name) for name in source.tensors}
    found = check_tensors(source, specs, first, {matrix.tensor for matrix in experts.matrices})
    if found.known and can_run(source):
        Decoder(source, experts).rehearse(source)
    # Where a quantization is declared, they were refused when the weights were joined with them.
    if parts := [name for name in (found.extra if found.known else found.needed) if name.endswith(PARTS)]:
        raise ValueError(
            f"{source.path}: expected weights alone, as config.json declares no quantization, got parts of quantized "
            f"ones: {some(parts)}: take config.json from where the weights are from, or remove these tensors"
        )
    return replace(found, family=taken_for(source))


def check_tensors(
    checkpoint: Checkpoint,
    specs: Mapping[str, TensorSpec],
    first: Mapping[str, tuple[int, int]],
    others: set[str],
) -> Found:
    """Check that nothing is missing beside a checkpoint's experts, which are complete; raises as ``check_source``.

    specs: what it holds, by the source's names; first: the shape of an expert's first matrix in each module; others:
    names of what is known and complete besides.
    """
    needed = needs(checkpoint)
    if needed is None:
        return Found(tuple(specs), known=False)
    missing = [names[0] for names in needed.tensors if specs.keys().isdisjoint(names)]
    missing += [module for module in needed.modules if module not in first]
    if missing:
        raise ValueError(
            f"{checkpoint.path}: expected the tensors that config.json implies, got none of {some(missing)}: "
            "download the source again or correct config.json"
        )
    for names, shape in needed.tensors.items():
        for name in names:
            if name in specs:
                _check_spec(checkpoint.config, name, shape, specs[name])
    which = "gate" if family_of(checkpoint).gated else "up"
    for module, shape in needed.modules.items():
        _check_shape(checkpoint.config, f"{module}: {which} of an expert", shape, first[module])
    known = others.union(draft_tensors(checkpoint), *needed.tensors)
    extra = {name: None for name in specs if name not in known}
    return Found(tuple(name for name in specs if name not in extra), tuple(extra))


def _check_spec(config: Mapping[str, Any], name: str, shape: tuple[int, ...], got: TensorSpec) -> None:
    if got.dtype not in (*SOURCE_DTYPES, torch.float64):
        raise ValueError(f"{name}: expected bfloat16, float16 or float32, got {got.dtype}: download the source again")
    _check_shape(config, name, shape, got.shape)


def _check_shape(config: Mapping[str, Any], name: str, shape: tuple[int, ...], got: tuple[int, ...]) -> None:
    if got == shape:
        return
    sizes = [size for size, other in zip(shape, got, strict=False) if size != other] or list(shape)
    keys = [key for size in dict.fromkeys(sizes) for key in _keys(text_config(config), size)]
    raise ValueError(
        f"{name}: expected shape {shape} by {some(keys) or 'config.json'}, got {got}: "
        "download the source again or correct config.json"
    )


def _keys(config: Mapping[str, Any], size: int) -> list[str]:
    """The fields of a config that make a size: of its value, or else two of attention heads whose product it is.

    >>> _keys({"num_heads": 4, "head_dim": 8, "hidden_size": 64}, 32)
    ['num_heads=4 times head_dim=8']
    """
    numbers = {key: value for key, value in config.items() if type(value) is int and value > 1}
    alone = [f"{key}={value}" for key, value in numbers.items() if value == size and not key.endswith("_id")]
    pairs = combinations(numbers.items(), 2)
    return alone or [f"{a}={m} times {b}={n}" for (a, m), (b, n) in pairs if m * n == size and "head" in a + b]


def check_values(source: Checkpoint, found: Found, experts: Experts) -> None:
    """Check that a source's needed tensors hold numbers that can be computed with.

    Raises ValueError, naming the tensor or the expert's matrix and the place, for NaN, infinity and what makes float32
    overflow.
    """
    name = first_damaged(source, found.needed)
    if name is None:
        return
    matrices = [matrix for matrix in experts.matrices if matrix.tensor == name]
    tensors = ((f"{matrix.name}.weight", load_matrix(source, matrix)) for matrix in matrices)
    for where, tensor in tensors if matrices else [(name, source.tensors[name].load_float32())]:
        bad = ~(tensor.abs() < LIMIT)
        if not bool(bad.any()):
            continue
        place = [int(i) for i in bad.nonzero()[0]]
        value, count = float(tensor[tuple(place)]), int((~tensor.isfinite()).sum())
        what = f"{count} NaN or infinite" if count else f"{int(bad.sum())} so large that float32 overflows"
        raise ValueError(
            f"{where}: expected finite weights, got {what}, the first {value:.3g} at {place}: the source is damaged: "
            "download it again"
        )


@one_thread()
def first_damaged(checkpoint: Checkpoint, names: Iterable[str]) -> str | None:
    """The first of the tensors with these names that holds NaN, infinity or what makes float32 overflow, if any.

    A part of a tensor is in memory at a time.
    """
    tensors = {name: checkpoint.tensors[name] for name in names if checkpoint.spec(name).dtype.is_floating_point}
    with Progress("check", sum(tensor.nbytes for tensor in tensors.values()), brief=True) as progress:
        for name, tensor in tensors.items():
            bound = tensor.bound() if isinstance(tensor, QuantizedTensor) else None
            # Of few bits, scales tell all.
            if (bound is None or not bound < LIMIT) and not all(map(_is_sound, tensor.chunks(_READ_BYTES))):
                return name
            progress.advance(tensor.nbytes)
    return None


def _is_sound(part: torch.Tensor) -> bool:
    if not part.numel():
        return True
    # Formats of 8 bits cannot be compared.
    low, high = (part.float() if part.dtype.itemsize == 1 else part).aminmax()
    # NaN is neither greater nor less.
    return float(low) > -LIMIT and float(high) < LIMIT
