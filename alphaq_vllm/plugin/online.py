"""Models in full precision, quantized while vLLM loads them, to the bytes that ``offline.convert`` would write.

The one module of the plugin that imports ``offline``; the config imports it when a checkpoint that is not quantized is
served. Before vLLM starts its workers, ``choose_online`` chooses the widths, by statistics that are kept for the next
start. Each worker then quantizes every expert matrix, or its rank's slice of it, the moment that it is read: beside the
quantized weights there is never more than one matrix in memory.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from alphaq_vllm.cores import within_quota
from alphaq_vllm.format import GRID, PACKED, QUANT_METHOD, SCALE, AlphaQSpec, matrix_tensors
from alphaq_vllm.plugin._compat import RoutedExperts, logger, set_weight_attrs, weight_loader
from alphaq_vllm.plugin.moe import SHARDS, AlphaQMoEMethod
from offline.allocation.bit_map import check_bit_map
from offline.allocation.widths import Budget
from offline.model.check import check_source, check_values
from offline.model.runnable import can_run
from offline.operations.cache import cached_statistics
from offline.operations.choosing import choose_widths
from offline.operations.options import ConvertOptions, options_from
from offline.operations.plan import Job, to_spec
from offline.progress import format_bytes
from offline.quantizers.grids import GRIDS
from offline.quantizers.quantize import quantize, scales_of
from offline.source.checkpoint import Checkpoint, open_checkpoint
from offline.source.families import find_experts
from offline.source.splitting import check_group_size
from offline.threads import one_thread

# Fields of ConvertOptions that quantization_config of --hf-overrides may have.
SETTINGS = (
    "bits", "fit_memory", "reserve", "bit_map", "preset", "mode", "candidate_bits", "gamma", "noise", "granularity",
    "shares", "seed", "group_size", "quantizer", "exclude",
)  # fmt: skip
WEIGHT = "weight"


@dataclass(frozen=True)
class Online:
    """How a model is quantized while it is loaded: as a checkpoint with this ``spec`` would be, by this quantizer."""

    spec: AlphaQSpec
    quantizer: str


def choose_online(model: str, revision: str | None, settings: Mapping[str, Any]) -> Online:
    """Choose the widths of a model in full precision, and say in the log what was done.

    model, revision: a directory, or a name on the Hub and what to take of it; settings: options of ``offline.convert``
    out of ``SETTINGS``.
    Raises ValueError or OSError for settings that are wrong, and for a model that cannot be quantized while it loads.
    """
    start = time.monotonic()
    options = _options(settings)
    widths, room, group_size = options.widths(), options.room(), options.group_size
    quantizer = options.quantizer or "mse"
    # As vLLM does, which takes a directory as it is.
    source = open_checkpoint(model, None if Path(model).is_dir() else revision)
    _check_source(source)
    every_expert = find_experts(source)
    found = check_source(source, every_expert)
    experts = options.selection().quantized(every_expert)
    # vLLM hands out the experts of other fused tensors one by one.
    if transposed := [matrix for matrix in experts.matrices if matrix.fused and matrix.fused.layout.transposed]:
        raise ValueError(
            f"{transposed[0].tensor}: expected matrices [out_features, in_features] to quantize while loading, got "
            f"transposed ones: run python -m offline.convert {model} OUT, and serve OUT"
        )
    check_group_size(group_size, experts.matrices)
    check_values(source, found, every_expert)
    if str(found):
        logger.warning("AlphaQ: %s: %s", model, found)
    job = Job(model, source, experts, group_size, quantizer=quantizer)
    statistics, how = None, "bit map given"
    if isinstance(widths, Budget):
        how = f"mode {widths.mode}"
        if widths.needs_alpha:
            statistics, how = cached_statistics(job, widths)
    else:
        check_bit_map(widths, experts.matrices)
    plan = choose_widths(job, widths, {}, room, statistics)
    logger.info(
        "AlphaQ quantizes %s while loading: %d expert matrices at %.4f bits on average (%.4f as stored), %s for the "
        "experts and %s for all weights; %s; decided in %.1f s. %s",
        model,
        len(experts.matrices),
        plan.summary.bits,
        plan.summary.stored_bits,
        format_bytes(plan.summary.experts_after),
        format_bytes(plan.tensor_bytes),
        how,
        time.monotonic() - start,
        _converted_instead(model, can_run(source)),
    )
    return Online(to_spec(plan.bits, experts.matrices, group_size), quantizer)


def _converted_instead(model: str, runs: bool) -> str:
    """What a checkpoint of ``offline.convert`` would have over this; runs: whether that can run the model."""
    over = (
        "would choose widths by the errors of the layers' outputs and quantize by gptq: the KL divergence was 20 "
        "to 70 % lower where that was measured, see docs/quality.md"
        if runs
        else "would write these weights once, and serving them starts faster"
    )
    return f"python -m offline.convert {model} OUT {over}"


def _options(settings: Mapping[str, Any]) -> ConvertOptions:
    try:
        options = options_from(settings, SETTINGS)
        if options.quantizer not in (None, *GRIDS):
            raise ValueError(
                f"`quantizer`: expected one of {', '.join(GRIDS)} to quantize while loading, got {options.quantizer}"
            )
        return options
    except (ValueError, OSError) as error:
        raise ValueError(f"quantization_config of --hf-overrides: {error}") from error


def refuse_quantized(method: object) -> NoReturn:
    """Raise ValueError for a checkpoint that another method has quantized; ``method``: its ``quant_method``."""
    raise ValueError(
        f"--quantization {QUANT_METHOD}: expected an AlphaQ checkpoint, or weights in bfloat16, float16 or float32 to "
        f"quantize while loading, got a checkpoint with quant_method {method!r}: run python -m offline.convert MODEL "
        "OUT, which reads quantized models too, and serve OUT"
    )


def _check_source(source: Checkpoint) -> None:
    """Raise ValueError for a checkpoint that is quantized already."""
    if source.quantization is None:
        return
    if source.quantization.method == QUANT_METHOD:
        raise ValueError(
            f"{source.path}: quantization_config of --hf-overrides: expected a model that is not quantized yet, got an "
            "AlphaQ checkpoint: leave out the setting"
        )
    refuse_quantized(source.quantization.method)


class OnlineMoEMethod(AlphaQMoEMethod):
    """One layer of routed experts that is stored in full precision, and quantized matrix by matrix as it is read.

    quantizer: one of ``GRIDS``; other arguments: see ``AlphaQMoEMethod``.
    """

    stored = (WEIGHT,)

    def __init__(self, *args: Any, quantizer: str) -> None:
        super().__init__(*args)
        self.quantizer = quantizer

    def create_weights(self, layer: RoutedExperts, *args: Any, **kwargs: Any) -> None:
        """Allocate what this rank's quantized experts take, and the names by which vLLM loads what is stored."""
        super().create_weights(layer, *args, **kwargs)
        for stem in self.shapes:
            # Not empty: where weights are loaded again, vLLM leaves out a layer into which it counts no element.
            param = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
            layer.register_parameter(f"{stem}_{WEIGHT}", param)
            set_weight_attrs(param, {"weight_loader": weight_loader(self._load_weight, layer)})

    def _load_weight(
        self,
        layer: RoutedExperts,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Quantize this rank's slice of one expert matrix into its place; called by vLLM's model loaders."""
        local_id = layer.expert_map_manager.map_global_to_local(expert_id)
        if local_id == -1:
            return False if return_success else None
        name = self._tensor_name(expert_id, shard_id, WEIGHT)
        stem, _, dim = SHARDS[shard_id]
        full = list(self.shapes[stem])
        full[dim] *= self.tp_size
        if list(loaded_weight.shape) != full or not loaded_weight.is_floating_point():
            raise ValueError(
                f"{name}: expected floating point of shape {tuple(full)}, got {loaded_weight.dtype} of shape "
                f"{tuple(loaded_weight.shape)}: this model cannot be quantized while loading, convert it first"
            )
        start, end = (rank * self.shapes[stem][dim] for rank in (self.tp_rank, self.tp_rank + 1))
        # Whole groups of columns, of which the first and the last may be other ranks' too.
        unit = self.group_size if dim == 1 else 1
        first, end = start // unit * unit, math.ceil(end / unit) * unit
        weight = loaded_weight.narrow(dim, first, end - first)
        num_bits = self.num_bits[shard_id][expert_id]
        device = getattr(layer, f"{stem}_{PACKED}").device
        try:
            # Ranks that share rows have the same scales, those of whole rows.
            shares_rows = weight.shape[1] < full[1] and not weight.is_meta
            scales = scales_of(loaded_weight, num_bits, self.group_size) if shares_rows else None
            tensors = _quantize(weight.to(device), scales, num_bits, self.group_size, self.quantizer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        for suffix, tensor in tensors.items():
            data = getattr(layer, f"{stem}_{suffix}").data
            self._copy_share(data, suffix, shard_id, expert_id, local_id, tensor, first)
        self.loaded.add(name)
        return True if return_success else None


def _quantize(
    weight: torch.Tensor, scales: torch.Tensor | None, num_bits: int, group_size: int, quantizer: str
) -> dict[str, torch.Tensor]:
    """The stored tensors of a matrix by suffix, computed on all cores of this process; rows do not depend on others.

    scales: of the rows, if these are some of a matrix's columns.
    """
    if weight.is_meta:
        # Where vLLM loads weights again, it counts first what will be copied.
        specs = matrix_tensors(weight.shape[0], weight.shape[1], num_bits, group_size)
        return {suffix: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for suffix, spec in specs.items()}
    scales = None if scales is None else scales.to(weight.device)
    if weight.device.type != "cpu":
        parts = [quantize(weight, num_bits, group_size, quantizer, scales)]
    else:
        threads = within_quota(torch.get_num_threads())
        work = partial(_quantize_rows, num_bits=num_bits, group_size=group_size, quantizer=quantizer)
        rows = weight.tensor_split(min(threads, len(weight)))
        scales_of_rows = [None] * len(rows) if scales is None else scales.tensor_split(len(rows))
        parts = list(_pool(threads).map(work, rows, scales_of_rows))
    return {
        PACKED: torch.cat([part.packed for part in parts]),
        SCALE: torch.cat([part.scale for part in parts]),
        GRID: torch.cat([part.grid for part in parts]),
    }


@one_thread()
def _quantize_rows(
    rows: torch.Tensor, scales: torch.Tensor | None, num_bits: int, group_size: int, quantizer: str
) -> Any:
    return quantize(rows, num_bits, group_size, quantizer, scales)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # vLLM binds each of OpenMP's threads to a core, this one too, on which any thread that it starts would stay. They
    # exist from the first large operation on.
    torch.zeros(2**20).add_(1)
    cores: set[int] = set()
    for thread in Path("/proc/self/task").glob("*"):
        cores |= os.sched_getaffinity(int(thread.name))
    return ThreadPoolExecutor(threads, initializer=lambda: os.sched_setaffinity(0, cores))
