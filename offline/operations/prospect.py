"""What converting and serving a model will take, from its config and headers alone, before a download."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alphaq_vllm.format import SUPPORTED_GROUP_SIZES, stored_bits_per_weight
from offline.model.check import check_source
from offline.model.runnable import can_run
from offline.operations.options import ConvertOptions
from offline.operations.plan import Job, scale_bytes
from offline.operations.serving import Gpus, cache_bytes_per_token, divide, parse_gpus
from offline.operations.timing import seconds_without_weights
from offline.source.checkpoint import Checkpoint, open_checkpoint
from offline.source.families import find_drafts, find_experts
from offline.source.hub import NAME
from offline.source.linear import UNQUANTIZED, check_linear_bits, linear_formats
from offline.source.outline import outline
from offline.source.recognition import taken_for
from offline.source.splitting import check_group_size
from offline.threads import choose_workers

# What sizes are told of beside the average that is asked for.
BUDGETS = (2.5, 3.0, 3.5, 4.0)


def plan(
    model: str | Path,
    *,
    bits: float | str = 3.5,
    gpus: str | None = None,
    group_size: int | None = None,
    linear_bits: int = UNQUANTIZED,
    head_bits: int = UNQUANTIZED,
    revision: str | None = None,
) -> dict[str, Any]:
    """Say what converting and serving a model will take. No tensor is read, and none downloaded.

    Args:
        model: A directory, or the name of a model on the Hugging Face Hub.
        bits: The average width of expert matrices.
        gpus: What is to serve it, as ``2x24GiB``.
        group_size: Input columns that share a grid; by default the most that fit, up to 64.
        linear_bits: Of linear layers outside the experts: 16 leaves them alone, 8 or 4.
        head_bits: Of the matrix that predicts tokens: 16 leaves it alone, 8 or 4.
        revision: Of a model on the Hub: a branch, a tag or a commit; by default its main branch.

    Returns:
        What ``python -m offline.plan --json`` prints, in bytes and seconds. Of a model that cannot be converted,
        ``covered`` is false and ``reason`` says why.

    Raises:
        ValueError: For a value that an argument does not take.
        OSError: For a model that is not there, and for what the Hub does not deliver.
    """
    average, machine = _average(bits), parse_gpus(gpus) if gpus is not None else None
    if group_size not in (None, *SUPPORTED_GROUP_SIZES):
        raise ValueError(f"`group_size`: expected one of {SUPPORTED_GROUP_SIZES}, got {group_size!r:.80}")
    check_linear_bits("linear_bits", linear_bits)
    check_linear_bits("head_bits", head_bits)
    with _found(str(model), revision) as (directory, commit):
        result = {"model": str(model), "commit": commit}
        try:
            job = _job(str(model), open_checkpoint(str(directory)), group_size, linear_bits, head_bits)
        except ValueError as error:
            return {**result, "covered": False, "reason": _named(error, directory, str(model))}
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{_named(error, directory, str(model))}") from error
        return {**result, "covered": True, **_describe(job, average, machine)}


def _average(bits: float | str) -> float:
    try:
        average = float(bits)
    except (TypeError, ValueError):
        average = math.nan
    if not 1 <= average <= 8:
        raise ValueError(f"`bits`: expected an average width from 1 to 8, got {bits!r:.80}")
    return average


@contextmanager
def _found(model: str, revision: str | None) -> Iterator[tuple[Path, str | None]]:
    """The model's directory or outline, and the commit of the latter."""
    if Path(model).exists() or not NAME.fullmatch(model):
        if revision is not None or not Path(model).is_dir():
            # Says what is wrong with that.
            open_checkpoint(model, revision)
        yield Path(model), None
        return
    if revision is not None and not (revision and revision.isprintable()):
        raise ValueError(f"`revision`: expected a branch, a tag or a commit, got {revision!r:.80}")
    with outline(model, revision) as found:
        yield found.directory, found.commit


def _named(error: Exception, directory: Path, model: str) -> str:
    """A message that names the model in the place of its outline."""
    return str(error).replace(str(directory), model)


def _job(model: str, source: Checkpoint, group_size: int | None, linear_bits: int, head_bits: int) -> Job:
    """What would be converted, layers that draft to their default width. Raises ValueError for what cannot be."""
    experts = find_experts(source)
    check_source(source, experts)
    drafts = dict.fromkeys(find_drafts(source).matrices, ConvertOptions.mtp_bits)
    matrices = (*experts.matrices, *drafts)
    if group_size is None:
        sizes = {matrix.shape[1] for matrix in matrices}
        fitting = (g for g in SUPPORTED_GROUP_SIZES if g <= Job.group_size and all(n % g == 0 for n in sizes))
        group_size = max(fitting, default=Job.group_size)
    check_group_size(group_size, matrices)
    linear = linear_formats(source, experts, linear_bits, head_bits)
    workers = choose_workers(None, experts.numel)
    return Job(model, source, experts, group_size, workers=workers, linear=linear, drafts=drafts)


def _describe(job: Job, bits: float, gpus: Gpus | None) -> dict[str, Any]:
    experts, source = job.experts, job.source
    matrix, numel = experts.matrices[0], experts.numel + sum(matrix.numel for matrix in job.drafts)
    return {
        "model_type": experts.model_type,
        "read_like": taken_for(source),
        "runs": can_run(source),
        "files": len(source.files),
        "size": source.nbytes,
        "layers": len(experts.modules),
        "experts": experts.num_experts,
        "matrices": len(experts.matrices),
        "expert_weights": experts.numel,
        "drafts": len(job.drafts),
        "draft_bits": next(iter(job.drafts.values()), 16),
        "group_size": job.group_size,
        "bits": bits,
        "budgets": [_budget(job, average) for average in sorted({*BUDGETS, bits})],
        "serving": _serving(job, bits, gpus) if gpus else None,
        "seconds": seconds_without_weights(matrix.shape[1], numel, bits, job.group_size, job.workers),
        "workers": job.workers,
    }


def _budget(job: Job, bits: float) -> dict[str, Any]:
    experts = round(job.experts.numel * stored_bits_per_weight(bits, job.group_size) / 8)
    experts += scale_bytes(job.experts.matrices)
    return {
        "bits": bits,
        "stored_bits": 8 * experts / job.experts.numel,
        "experts": experts,
        "size": job.bytes_at(bits),
    }


def _serving(job: Job, bits: float, gpus: Gpus) -> dict[str, Any]:
    """How the model would lie on the GPUs, in each way that there is."""
    per_token = cache_bytes_per_token(job.source.config, gpus.number)
    ways: list[dict[str, Any]] = []
    parallels: Sequence[Any] = ("tensor", "expert") if gpus.number > 1 else ("tensor",)
    for parallel in parallels:
        way: dict[str, Any] = {"parallel": parallel if gpus.number > 1 else None}
        try:
            divided = divide(job, bits, gpus.number, parallel)
        except ValueError as error:
            ways.append({**way, "possible": False, "reason": str(error)})
            continue
        left = gpus.usable - divided.weights
        tokens = max(0, left) // per_token if per_token else None
        sizes = {"weights": divided.weights, "group_size": divided.group_size, "left": left, "cache_tokens": tokens}
        ways.append({**way, "possible": True, **sizes})
    return {"gpus": gpus.number, "memory": gpus.memory, "usable": gpus.usable, "ways": ways}
