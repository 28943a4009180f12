"""The routed experts of a model: which tensors hold them, and whether they are complete.

Layers for multi-token prediction, numbered after the decoder's or named ``mtp.``, only draft, and vLLM serves them as a
model of its own. Their experts are found apart. They may be absent although the config declares them, because
transformers leaves them out when it saves a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from offline.messages import some
from offline.source.architectures import Family, experts_size, num_experts, num_layers, text_config
from offline.source.checkpoint import Checkpoint
from offline.source.fused import FusedPart
from offline.source.quantized.method import READ
from offline.source.quantized.tensor import QuantizedTensor
from offline.source.recognition import family_of
from offline.threads import compute_device

SOURCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class ExpertMatrix:
    """One projection of one expert; ``shape`` is ``(out_features, in_features)``.

    fused: where it lies if an ordinary checkpoint holds it in a fused tensor.
    """

    module: str
    expert: int
    projection: str
    shape: tuple[int, int]
    fused: FusedPart | None = None

    @property
    def name(self) -> str:
        """The name that statistics, bit maps and stored tensors go by."""
        return f"{self.module}.{self.expert}.{self.projection}"

    @property
    def tensor(self) -> str:
        """The tensor of an ordinary checkpoint that holds the matrix, alone or with others."""
        return self.fused.tensor if self.fused else f"{self.name}.weight"

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The matrix within ``tensor``, which is a view."""
        return self.fused.view(tensor[self.expert]) if self.fused else tensor


@dataclass(frozen=True)
class Experts:
    """All routed experts of a model, by layer, expert and projection (gate, up, down, or up, down)."""

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

    def of(self, module: str) -> list[list[ExpertMatrix]]:
        """The matrices of each expert of a module, in order: gate, up and down, or up and down."""
        return by_expert(matrix for matrix in self.matrices if matrix.module == module)


def find_experts(source: Checkpoint) -> Experts:
    """Find the routed experts of a checkpoint that is to be converted, and check that they are complete.

    Raises ValueError for a model that is dense or unknown, or quantized in a way that is not read, for a number of
    experts or layers that disagrees with the config, for missing or unexpected tensors, and for impossible shapes and
    dtypes.
    """
    family = family_of(source)
    _check_quantization(source)
    blocks = _blocks(source, family)
    if not blocks:
        raise ValueError(
            f"{source.path}: expected tensors such as {family.example}, got none: the model has no experts"
        )
    expected = num_experts(source.config)
    matrices = [
        matrix
        for block, names in _in_decoder(source, blocks).items()
        for matrix in _block_matrices(source, family, block, names, expected)
    ]
    check_shapes(matrices, family, source.config)
    return Experts(str(source.config["model_type"]), expected, tuple(matrices))


def find_drafts(source: Checkpoint) -> Experts:
    """The routed experts of the layers for multi-token prediction, of families whose draft model vLLM serves quantized;
    none of others, and none where there are no such layers.

    Raises ValueError as ``find_experts`` does, which has to pass before.
    """
    family, expected = family_of(source), num_experts(source.config)
    decoder, _ = num_layers(source.config)
    matrices: list[ExpertMatrix] = []
    if family.drafts:
        own = family.drafting
        for block, names in _blocks(source, own).items():
            if own is not family or _layer(block) >= decoder:
                matrices += _block_matrices(source, own, block, names, expected)
        check_shapes(matrices, family, source.config)
    return Experts(str(source.config["model_type"]), expected, tuple(matrices))


def by_expert(matrices: Iterable[ExpertMatrix]) -> list[list[ExpertMatrix]]:
    """The matrices of each expert of each module, in the order that they have."""
    found: dict[tuple[str, int], list[ExpertMatrix]] = {}
    for matrix in matrices:
        found.setdefault((matrix.module, matrix.expert), []).append(matrix)
    return list(found.values())


def load_matrix(source: Checkpoint, matrix: ExpertMatrix) -> torch.Tensor:
    """A matrix of a source, ``[out_features, in_features]`` float32; of a fused tensor only its expert is read."""
    tensor = source.tensors[matrix.tensor]
    if matrix.fused is None:
        return tensor.load_float32()
    return matrix.fused.view(tensor.load_float32(matrix.expert)).contiguous()


def load_weight(source: Checkpoint, matrix: ExpertMatrix) -> torch.Tensor:
    """A matrix of the source, ``[out_features, in_features]`` float32, on the device that computes.

    Raises ValueError for NaN or infinite weights.
    """
    weight = load_matrix(source, matrix).to(compute_device())
    # Unlike isfinite of all of it, this takes no memory.
    if not bool(torch.stack(weight.aminmax()).isfinite().all()):
        bad = int((~weight.isfinite()).sum())
        raise ValueError(
            f"{matrix.name}.weight: expected finite weights, got {bad} NaN or infinite: the source is damaged"
        )
    return weight


def matrix_nbytes(source: Checkpoint, matrix: ExpertMatrix) -> int:
    """Bytes that a matrix takes in the files of its source, scales included."""
    tensor = source.tensors[matrix.tensor]
    return tensor.nbytes * matrix.numel // math.prod(tensor.spec.shape)


def code_bits(source: Checkpoint, experts: Experts) -> int | None:
    """The most bits that a weight of the experts has in the source, without scales; None if they are not quantized."""
    tensors = [source.tensors[name] for name in {matrix.tensor for matrix in experts.matrices}]
    bits = [tensor.num_bits if isinstance(tensor, QuantizedTensor) else None for tensor in tensors]
    return None if None in bits else max(number for number in bits if number)


def tensor_shape(matrices: Sequence[ExpertMatrix]) -> tuple[int, ...]:
    """The shape of the tensor of an ordinary checkpoint that holds all of these matrices and no others."""
    part, shape = matrices[0].fused, matrices[0].shape
    return part.fused_shape(len({matrix.expert for matrix in matrices}), shape) if part else shape


def check_shapes(matrices: Iterable[ExpertMatrix], family: Family, config: Mapping[str, Any]) -> None:
    """Raise ValueError unless gate and up of all experts in a module agree, and down is their transpose."""
    size = experts_size(config)
    shapes: dict[str, tuple[int, int]] = {}
    for matrix in matrices:
        out_features, in_features = shape = matrix.shape
        if matrix.projection == family.down:
            shape = in_features, out_features
        if shape[1] != size:
            key = "hidden_size" if text_config(config).get("moe_latent_size") is None else "moe_latent_size"
            stored = f" in {matrix.tensor}, read as {matrix.fused.order}" if matrix.fused else ""
            raise ValueError(f"{matrix.name}: expected {key}={size} as one side, got shape {matrix.shape}{stored}")
        first = shapes.setdefault(matrix.module, shape)
        if shape != first:
            raise ValueError(
                f"{matrix.name}: expected an intermediate size of {first[0]} as in the module's other matrices, "
                f"got {shape[0]}"
            )


def _check_quantization(source: Checkpoint) -> None:
    """Raise ValueError unless the weights are stored as numbers, or in a way that reads as numbers."""
    if source.quantization and not source.quantization.readers:
        raise ValueError(
            f"{source.path}: already quantized (quant_method {source.quantization.method!r:.80}): expected weights in "
            f"bfloat16, float16 or float32, or quantized by {READ}: convert the original model"
        )
    if source.fault:
        raise ValueError(source.fault)


def _blocks(source: Checkpoint, family: Family) -> dict[str, set[str]]:
    """The names of the experts' tensors below each MoE block."""
    fused = "|".join(map(re.escape, family.fused.tensors))
    pattern = re.compile(rf"({family.block})\.(experts\..+|{fused})")
    blocks: dict[str, set[str]] = {}
    for name in source.tensors:
        if match := pattern.fullmatch(name):
            blocks.setdefault(match[1], set()).add(match[2])
    return blocks


def _layer(block: str) -> int:
    """The number of the layer that a block is in."""
    return int(re.findall(r"\d+", block)[-1])


def _in_decoder(source: Checkpoint, blocks: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The blocks of the decoder, by layer."""
    layers = {block: _layer(block) for block in blocks}
    decoder, following = num_layers(source.config)
    for block, layer in layers.items():
        if layer >= decoder + following:
            raise ValueError(f"{block}: expected layers up to {decoder + following - 1} as config.json says, got more")
    found = {block: blocks[block] for block in sorted(blocks, key=layers.__getitem__) if layers[block] < decoder}
    if not found:
        raise ValueError(f"{source.path}: expected experts in layers up to {decoder - 1} as config.json says, got none")
    return found


def _block_matrices(
    source: Checkpoint, family: Family, block: str, names: set[str], expected: int
) -> list[ExpertMatrix]:
    fused = not family.individual or not names.isdisjoint(family.fused.tensors)
    if fused and names.issuperset(family.fused.tensors):
        family = _oriented(source, family, block)
    _check_names(family, block, names, expected, fused)
    module, matrices = f"{block}.experts", []
    for expert, projection in product(range(expected), family.projections):
        part = family.part(module, projection) if fused else None
        name = f"{module}.{expert}.{projection}.weight"
        shape = _fused_shape(source, part, expected) if part else _shape(source, name)
        matrices.append(ExpertMatrix(module, expert, projection, shape, part))
    return matrices


def _oriented(source: Checkpoint, family: Family, block: str) -> Family:
    """The family with its fused tensors in the orientation that they have in a block."""
    first, down = (source.spec(f"{block}.{name}").shape for name in (family.fused.gate_up, family.fused.down))
    size = experts_size(source.config)
    if type(size) is not int:
        return family
    return replace(family, fused=family.fused.oriented(first, down, size, family.gated))


def _check_names(family: Family, block: str, names: set[str], expected: int, fused: bool) -> None:
    says = f"{block}: expected {expected} experts as config.json says"
    if expected > len(names) and not fused:
        raise ValueError(f"{says}, got only {len(names)} tensors")
    tensors = list(family.fused.tensors)
    if not fused:
        tensors = [f"experts.{e}.{projection}.weight" for e in range(expected) for projection in family.projections]
    missing = [name for name in tensors if name not in names]
    unknown = sorted(names.difference(tensors, family.kept))
    if missing:
        raise ValueError(f"{says}, got none of {some(missing)}" + (f", but {some(unknown)}" if unknown else ""))
    if unknown:
        raise ValueError(f"{says}, got also {some(unknown)}")


def _shape(source: Checkpoint, name: str) -> tuple[int, int]:
    spec = source.spec(name)
    if spec.dtype not in SOURCE_DTYPES or len(spec.shape) != 2 or 0 in spec.shape:
        raise ValueError(
            f"{name}: expected a matrix in bfloat16, float16 or float32, got {spec.dtype} of shape {spec.shape}"
        )
    return spec.shape[0], spec.shape[1]


def _fused_shape(source: Checkpoint, part: FusedPart, expected: int) -> tuple[int, int]:
    spec = source.spec(part.tensor)
    if spec.dtype not in SOURCE_DTYPES or len(spec.shape) != 3 or spec.shape[0] != expected or 0 in spec.shape:
        raise ValueError(
            f"{part.tensor}: expected {part.order} of {expected} experts in bfloat16, float16 or float32, "
            f"got {spec.dtype} of shape {spec.shape}"
        )
    return part.matrix_shape(spec.shape)
