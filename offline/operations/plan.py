"""What a converted checkpoint will consist of: every tensor and every file, known to the byte before it is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alphaq_vllm.checksums import SUMS, render_sums, sums_size
from alphaq_vllm.format import (
    NO_WEIGHTS_FILE,
    PACKED,
    SCALE,
    SCALE_DTYPE,
    WEIGHTS_FILE,
    AlphaQSpec,
    LinearFormat,
    TensorSpec,
    matrix_tensors,
    stored_bits_per_weight,
)
from offline.allocation.bit_map import average_bits
from offline.allocation.sizes import Room
from offline.allocation.widths import Choice
from offline.journal import sync
from offline.messages import printed
from offline.operations.card import CARD, render_card
from offline.operations.summary import Summary, count_widths
from offline.quantizers.quantize import quantize
from offline.quantizers.symmetric import quantize_symmetric
from offline.source.architectures import with_plain_dtypes, without_code
from offline.source.checkpoint import Checkpoint
from offline.source.families import ExpertMatrix, Experts, code_bits, load_weight
from offline.source.hub import snapshot_of
from offline.source.linear import UNQUANTIZED, LinearLayer, is_head
from offline.source.quantized.method import without_quantization
from offline.threads import compute_device
from offline.writing.output import Output
from offline.writing.writer import DEFAULT_SHARD_BYTES, Piece, Shard, Writer, copied, plan_shards, small_files


@dataclass(frozen=True)
class Job:
    """What is to be converted, and all that the result depends on besides the widths.

    model: the source as the user named it; experts: those to quantize; max_shard_bytes: of data in one file; workers:
    processes to use, on which the result does not depend; linear: the linear layers to quantize; quantizer: one of
    ``QUANTIZERS``; drafts: the experts' matrices of layers that draft, with their widths; calibration_tokens, own_text:
    of gptq, how many it uses, and whether the model writes them itself.
    """

    model: str
    source: Checkpoint
    experts: Experts
    group_size: int = 64
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    workers: int = 1
    linear: Mapping[LinearLayer, LinearFormat] = field(default_factory=dict)
    drafts: Mapping[ExpertMatrix, int] = field(default_factory=dict)
    quantizer: str = "mse"
    calibration_tokens: int = 0
    own_text: bool = False

    @property
    def data_free_quantizer(self) -> str:
        """The quantizer whose errors are measured."""
        return "mse" if self.quantizer == "gptq" else self.quantizer

    @property
    def name(self) -> str:
        """The source's name on the Hub, or that of its directory."""
        path = Path(self.model)
        if not path.is_dir():
            return self.model
        snapshot = snapshot_of(path)
        return snapshot.name if snapshot else printed(path.resolve().name)

    def bytes_at(self, bits: float) -> int:
        """Bytes that the weights of the result take at an average width, but for headers."""
        matrices = (*self.experts.matrices, *self.drafts)
        replaced = {matrix.tensor for matrix in matrices} | {layer.tensor for layer in self.linear}
        kept = sum(self.source.spec(name).nbytes for name in self.source.tensors if name not in replaced)
        stored = self.experts.numel * stored_bits_per_weight(bits, self.group_size) / 8
        stored += sum(m.numel * stored_bits_per_weight(b, self.group_size) / 8 for m, b in self.drafts.items())
        linear = [spec for layer, linear_format in self.linear.items() for spec in layer.specs(linear_format).values()]
        return kept + round(stored) + scale_bytes(matrices) + sum(spec.nbytes for spec in linear)


@dataclass(frozen=True)
class Plan:
    """A checkpoint that is decided but not computed; bits: by matrix name; extra: its own small files, by name."""

    job: Job
    bits: Mapping[str, int]
    shards: Sequence[Shard]
    config: Mapping[str, Any]
    extra: Mapping[str, str]
    summary: Summary

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file by name."""
        small = small_files(self.shards, self.config, self.job.source.sidecars, self.extra)
        sizes = {shard.name: shard.nbytes for shard in self.shards}
        sizes |= {name: len(content) for name, content in small.items()}
        return {**sizes, SUMS: sums_size(sizes)}

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors: what they take in memory."""
        return sum(piece.nbytes for shard in self.shards for piece in shard.pieces)

    def bytes_of(self, room: Room) -> int:
        """Bytes of what has to keep to the room."""
        return self.tensor_bytes if room.in_memory else sum(self.sizes.values())

    def writer(self, output: Output) -> Writer:
        """What writes the files. Of gptq, the matrices are for somebody else to store with it, before all else."""
        return Writer(output, self.shards, self.config, self.job.source.sidecars, self.extra)

    def complete(self, writer: Writer) -> None:
        """Compute and write what nobody has stored, and the sums of all files."""
        writer.write(self.job.workers, shared=self.job)
        directory = writer.output.directory
        sums = directory / SUMS
        sums.write_text(render_sums(directory))
        sync(sums)


def plan(job: Job, choice: Choice, extra: Mapping[str, str]) -> Plan:
    """Plan the checkpoint that has the chosen widths; extra: texts of files to add, by name."""
    shards = plan_shards(pieces(job, choice.bits), job.max_shard_bytes)
    drafts = {matrix.name: num_bits for matrix, num_bits in job.drafts.items()}
    spec = to_spec({**choice.bits, **drafts}, (*job.experts.matrices, *job.drafts), job.group_size)
    linear = {layer.name: linear_format for layer, linear_format in job.linear.items()}
    spec = replace(spec, linear=linear, family=job.source.family)
    plain = without_quantization(without_code(with_plain_dtypes(job.source.config)))
    config = {**plain, WEIGHTS_FILE: NO_WEIGHTS_FILE, "quantization_config": spec.to_dict()}
    summary = _summary(job, choice, shards)
    planned = Plan(
        job, choice.bits, shards, config, {CARD: render_card(summary, job.name, job.source.path), **extra}, summary
    )
    summary = replace(summary, total_size=sum(planned.sizes.values()), loaded_size=planned.tensor_bytes)
    return replace(planned, summary=summary)


def pieces(job: Job, bits: Mapping[str, int]) -> list[Piece]:
    """The tensors of the checkpoint, in the order of the source's."""
    matrices: dict[str, list[ExpertMatrix]] = {}
    for matrix in (*job.experts.matrices, *job.drafts):
        matrices.setdefault(matrix.tensor, []).append(matrix)
    widths = {matrix: job.drafts.get(matrix) or bits[matrix.name] for many in matrices.values() for matrix in many}
    linear = {layer.tensor: layer for layer in job.linear}
    planned = []
    for name in job.source.tensors:
        if layer := linear.get(name):
            planned.append(Piece(layer.specs(job.linear[layer]), partial(_quantized_linear, job, layer)))
        elif name not in matrices:
            planned.append(copied(job.source, name))
        for matrix in matrices.get(name, ()):
            specs = quantized_specs([matrix], {matrix.name: widths[matrix]}, job.group_size)
            stored = job.quantizer == "gptq" and matrix not in job.drafts
            compute = None if stored else partial(_quantized, job, matrix, widths[matrix])
            planned.append(Piece(specs, compute))
    return planned


def scale_bytes(matrices: Iterable[ExpertMatrix]) -> int:
    """Bytes of the scales of all rows, which take the same at every width."""
    return SCALE_DTYPE.itemsize * sum(matrix.shape[0] for matrix in matrices)


def quantized_specs(
    matrices: Iterable[ExpertMatrix], bits: Mapping[str, int], group_size: int
) -> dict[str, TensorSpec]:
    """The stored tensors of matrices, by name."""
    return {
        f"{matrix.name}.{suffix}": spec
        for matrix in matrices
        for suffix, spec in matrix_tensors(*matrix.shape, bits[matrix.name], group_size).items()
    }


def _quantized(job: Job, matrix: ExpertMatrix, num_bits: int) -> dict[str, torch.Tensor]:
    weight = load_weight(job.source, matrix)
    return quantize(weight, num_bits, job.group_size, job.data_free_quantizer).tensors(matrix.name)


def _quantized_linear(job: Job, layer: LinearLayer) -> dict[str, torch.Tensor]:
    """Raises ValueError for NaN or infinite weights."""
    linear_format = job.linear[layer]
    weight = job.source.tensors[layer.tensor].load_float32().to(compute_device())
    if bad := int((~weight.isfinite()).sum()):
        raise ValueError(f"{layer.tensor}: expected finite weights, got {bad} NaN or infinite: the source is damaged")
    quantized = quantize_symmetric(weight, linear_format.num_bits, linear_format.group_size)
    return {f"{layer.name}.{PACKED}": quantized.packed, f"{layer.name}.{SCALE}": quantized.scale}


def _summary(job: Job, choice: Choice, shards: Sequence[Shard]) -> Summary:
    experts = job.experts
    specs = quantized_specs(experts.matrices, choice.bits, job.group_size)
    experts_after = sum(spec.nbytes for spec in specs.values())
    quantization = job.source.quantization
    head = [stored.num_bits for layer, stored in job.linear.items() if is_head(layer.name)]
    layers = [stored.num_bits for layer, stored in job.linear.items() if not is_head(layer.name)]
    return Summary(
        source=job.model,
        family=experts.model_type,
        layers=len(experts.modules),
        experts=experts.num_experts,
        matrices=len(experts.matrices),
        group_size=job.group_size,
        quantizer=job.quantizer,
        calibration_tokens=job.calibration_tokens,
        own_text=job.own_text,
        noise=choice.noise,
        mode=choice.mode,
        bits=average_bits(choice.bits, experts.matrices),
        stored_bits=8 * experts_after / experts.numel,
        size_before=job.source.nbytes,
        size_after=sum(shard.nbytes for shard in shards),
        experts_before=sum(job.source.tensors[name].nbytes for name in {matrix.tensor for matrix in experts.matrices}),
        experts_after=experts_after,
        widths=count_widths(choice.bits),
        alpha=choice.alpha,
        gamma=choice.gamma,
        gap=choice.gap,
        drafts=len(job.drafts),
        draft_bits=next(iter(job.drafts.values()), 16),
        linear_layers=len(layers),
        linear_bits=next(iter(layers), UNQUANTIZED),
        head_bits=next(iter(head), UNQUANTIZED),
        code=job.source.beside.code,
        left=job.source.beside.left,
        source_method=quantization.method if quantization else None,
        source_bits=code_bits(job.source, experts) if quantization else None,
        source_rounded=quantization.rounded if quantization else False,
    )


def to_spec(bits: Mapping[str, int], matrices: Iterable[ExpertMatrix], group_size: int) -> AlphaQSpec:
    """The checkpoint's ``quantization_config`` for these widths of experts' matrices, in their order."""
    num_bits: dict[str, dict[str, tuple[int, ...]]] = {}
    for matrix in matrices:
        projections = num_bits.setdefault(matrix.module, {})
        projections[matrix.projection] = (*projections.get(matrix.projection, ()), bits[matrix.name])
    return AlphaQSpec(group_size, num_bits)
