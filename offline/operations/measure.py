"""The statistics that widths are chosen by: measured, or found in a file that still holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from alphaq_vllm.format import stored_bits_per_weight
from offline.allocation.widths import Choice
from offline.journal import Journal
from offline.model.check import check_source, check_values
from offline.model.runnable import can_run
from offline.model.text import MAX_TOKENS
from offline.operations.options import MeasureOptions, with_options
from offline.operations.plan import Job, plan
from offline.quantizers.quantize import prepare
from offline.sensitivity.matrices import measure_matrices
from offline.sensitivity.propagation import error_gains
from offline.sensitivity.stats import STATS, Origin, Statistics, read_statistics
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts
from offline.source.fingerprint import fingerprint
from offline.source.splitting import check_group_size
from offline.threads import choose_workers


@with_options(MeasureOptions)
def measure(model: str | Path, output: str | Path | None, options: MeasureOptions) -> Statistics:
    """Measure alpha and quantization errors of every expert matrix, once for all budgets.

    Args:
        model: A directory, or the name of a model on the Hugging Face Hub.
        output: A CSV file for the statistics, or None. If it is there already, it is read instead, and its statistics
            have ``path`` set.
        options: The fields of ``MeasureOptions``, as keywords.

    Returns:
        The statistics, for ``allocate``; a file of them also for the option ``stats`` of ``convert``.

    Raises:
        ValueError: For a file that is of another source or other settings, and for anything wrong with the source.
        OSError: For files that cannot be read or written.
    """
    source = open_checkpoint(str(model), options.revision, options.family)
    experts = find_experts(source)
    held = check_source(source, experts)
    check_group_size(options.group_size, experts.matrices)
    budget = options.budget(can_run(source))
    output = Path(output) if output else None
    if output and output.exists():
        found = read_statistics(output)
        found.check(
            fingerprint(source), options.group_size, budget.measured_widths, options.quantizer, budget.needs_gains
        )
        return found
    if output:
        # Fails before the work rather than after it.
        output.touch()
        output.unlink()
    check_values(source, held, experts)
    prepare()
    workers = choose_workers(options.workers, experts.numel)
    job = Job(str(model), source, experts, options.group_size, workers=workers, quantizer=options.quantizer)
    statistics = take_statistics(job, budget.measured_widths, gains=budget.needs_gains)
    if output:
        output.write_text(str(statistics))
    return statistics


def take_statistics(
    job: Job,
    widths: Sequence[int],
    journal: Journal | None = None,
    gains: bool = False,
    text: Callable[[], Tensor] | None = None,
) -> Statistics:
    """Measure all matrices of a job, and their errors at ``widths``.

    journal: see ``measure_matrices`` and ``error_gains``; gains: whether to measure also how errors propagate;
    text: see ``error_gains``.
    """
    quantizer = job.data_free_quantizer
    matrices = measure_matrices(
        job.source, job.experts.matrices, widths, job.group_size, job.workers, journal, quantizer
    )
    if gains:
        # Also for experts that are left alone.
        gain = error_gains(job.source, find_experts(job.source), job.group_size, job.workers, text, journal)
        matrices = [replace(matrix, gain=gain[matrix.name]) for matrix in matrices]
    origin = Origin(job.name, fingerprint(job.source), job.group_size, len(matrices), 0, 0, quantizer)
    # The longest names in the card, and 8 bits, because the numbers in headers have the most digits then.
    longest = replace(job, quantizer="gptq", calibration_tokens=MAX_TOKENS, own_text=True)
    eight = {matrix.name: 8 for matrix in matrices}
    widest = Statistics(replace(origin, other_files=job.source.nbytes, other_tensors=job.source.nbytes), matrices)
    planned = plan(longest, Choice(eight, "alphaq", noise="propagated"), {STATS: str(widest)})
    experts = round(job.experts.numel * stored_bits_per_weight(8, job.group_size) / 8)
    others = sum(planned.sizes.values()) - experts
    return Statistics(replace(origin, other_files=others, other_tensors=planned.tensor_bytes - experts), matrices)
