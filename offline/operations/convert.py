"""From a Hugging Face checkpoint to an AlphaQ checkpoint, without calibration data.

Everything that can be wrong with the options or the source is checked first. Then the expert matrices are measured,
their widths chosen, and the checkpoint quantized and written, with one matrix in memory at a time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from alphaq_vllm.paths import check_path
from offline.allocation.bit_map import average_bits, check_bit_map
from offline.allocation.sizes import Room
from offline.allocation.widths import Budget, average_left
from offline.journal import Journal
from offline.layerwise.sequential import SequentialGptq
from offline.model.check import check_source, check_values
from offline.model.decoder import Decoder
from offline.model.passes import kept_nbytes
from offline.model.runnable import can_run
from offline.model.text import Calibration
from offline.operations.choosing import choose_widths
from offline.operations.memory import fit
from offline.operations.options import ConvertOptions, with_options
from offline.operations.plan import Job
from offline.operations.summary import Summary
from offline.operations.timing import expect
from offline.progress import Course, course, format_seconds
from offline.quantizers.quantize import prepare
from offline.sensitivity.propagation import LENGTH, TOKENS
from offline.sensitivity.stats import read_statistics
from offline.source.checkpoint import Checkpoint, open_checkpoint
from offline.source.families import Experts, find_drafts, find_experts
from offline.source.linear import UNQUANTIZED, linear_formats
from offline.source.selection import Selection
from offline.source.splitting import check_group_size
from offline.threads import WORTH_PROCESSES
from offline.writing.output import check_output, conditions, open_output, resolved

# Seconds of work that is announced.
_LONG = 60.0


@with_options(ConvertOptions)
def convert(model: str | Path, out: str | Path, options: ConvertOptions) -> Summary:
    """Convert a checkpoint.

    Args:
        model: A directory, or the name of a model on the Hugging Face Hub.
        out: A directory that is empty or does not exist.
        options: The fields of ``ConvertOptions``, as keywords.

    Returns:
        What was done; printed, it is what the command prints.

    Raises:
        ValueError: For anything that is wrong with the options or the source. No output is left then.
        OSError: For files that cannot be read or written. What is done so far is kept for ``resume``.
    """
    with course() as phases:
        return _convert(str(model), resolved(out), options, phases)


def _convert(model: str, out: Path, options: ConvertOptions, phases: Course) -> Summary:
    start, group_size = time.monotonic(), options.group_size
    source = open_checkpoint(model, options.revision, options.family)
    every_expert = find_experts(source)
    found = check_source(source, every_expert)
    runs = options.effort > 0 and can_run(source)
    quantizer = options.quantizer or ("gptq" if runs else "mse")
    calibration = options.text(quantizer)
    given = read_statistics(Path(options.stats)) if options.stats else None
    widths = options.widths(given.has_gains if given else runs)
    room, selection = options.room(), options.selection()
    experts = selection.quantized(every_expert)
    check_group_size(group_size, experts.matrices, options.tp_size)
    fixed = _check_widths(widths, experts, selection, room)
    linear = linear_formats(source, experts, options.linear_bits, options.head_bits, options.tp_size)
    every_draft = find_drafts(source)
    drafts = dict.fromkeys(every_draft.matrices if options.mtp_bits < UNQUANTIZED else (), options.mtp_bits)
    check_group_size(group_size, tuple(drafts), options.tp_size)
    job = Job(model, source, experts, group_size, options.shard_bytes(), 1, linear, drafts, quantizer)
    wanted = calibration or Calibration(times=options.text_times)
    gptq = SequentialGptq(source, every_expert, wanted) if quantizer == "gptq" else None
    propagates = isinstance(widths, Budget) and widths.needs_gains and not given
    decoder = gptq.decoder if gptq else Decoder(source, every_expert) if propagates else None
    fitted = fit(job, gptq, decoder, propagates, options.workers, options.memory_bytes(), bool(calibration))
    workers = fitted.workers
    if gptq and fitted.tokens < gptq.tokens:
        gptq = SequentialGptq(source, every_expert, Calibration(tokens=fitted.tokens))
    job = replace(job, workers=workers)
    if gptq:
        job = replace(job, calibration_tokens=gptq.tokens, own_text=gptq.own_text)
    needed_bytes = _least_bytes(job, widths, room) + _kept_bytes(source, decoder, gptq, propagates)
    check_path(out)
    check_output(out, source.path.resolve(), needed_bytes, options.resume)
    check_values(source, found, every_expert)
    prepare()
    settings = {
        "widths": asdict(widths) if isinstance(widths, Budget) else widths,
        "group_size": group_size,
        "quantizer": quantizer,
        "calibration": gptq.digest if gptq else None,
        "drafts": options.mtp_bits if drafts else None,
        "linear": {layer.name: asdict(stored) for layer, stored in linear.items()},
        "max_shard_bytes": job.max_shard_bytes,
        "selection": asdict(selection),
        "room": asdict(room) if room else None,
        "stats": given.digest if given else None,
    }

    if fitted.less:
        print(fitted.less, file=sys.stderr, flush=True)

    def announce(journal: Journal | None = None) -> None:
        with course():
            phases.expected = expect(job, every_expert, widths, gptq, given is not None, journal)
        _say_how_long(phases)

    if options.dry_run:
        announce()
        plan = choose_widths(job, widths, fixed, room, given)
        last = phases.expected.get("gptq", 0.0) + phases.expected["write"]
    else:
        last = 0.0
        with open_output(out, conditions(source, settings), options.resume) as output:
            if experts.numel >= WORTH_PROCESSES:
                announce(output.journal)
            # The model writes its text once, where both need it.
            text = partial(gptq.text, workers, output.journal) if gptq and gptq.writes(TOKENS, LENGTH) else None
            plan = choose_widths(job, widths, fixed, room, given, output.journal, text)
            writer = plan.writer(output)
            if gptq:
                starved = gptq.run(plan.bits, group_size, writer.store, workers, output.journal)
                plan = replace(plan, summary=replace(plan.summary, starved=starved))
            plan.complete(writer)
    limit = str(room) if room else None
    return replace(
        plan.summary,
        output=str(out),
        room=limit,
        memory=fitted.nbytes,
        seconds=time.monotonic() - start + last,
        phases=phases.spent,
        expected=phases.expected,
        dry_run=options.dry_run,
        found=str(found),
    )


def _kept_bytes(source: Checkpoint, decoder: Decoder | None, gptq: SequentialGptq | None, propagates: bool) -> int:
    """Bytes that are kept while the model runs, for a resumed run to go on from; decoder: where it is run."""
    texts = [(gptq.tokens, gptq.length)] if gptq else []
    if propagates:
        texts.append((TOKENS, LENGTH))
    if decoder is None:
        return 0
    return max(kept_nbytes(decoder, source, tokens, length) for tokens, length in texts)


def _say_how_long(phases: Course) -> None:
    """One line before long work."""
    if (total := sum(phases.expected.values())) >= _LONG:
        parts = ", ".join(f"{phase} {format_seconds(seconds)}" for phase, seconds in phases.expected.items() if seconds)
        print(f"about {format_seconds(total)} to go: {parts}", file=sys.stderr, flush=True)


def _check_widths(
    widths: Budget | Mapping[str, int], experts: Experts, selection: Selection, room: Room | None
) -> dict[str, int]:
    """Check what can be known before measuring, and return the widths that are given by hand beside a budget."""
    fixed = selection.fixed(experts.matrices)
    if isinstance(widths, Budget):
        if not room:
            average_left(experts.matrices, fixed, widths)
        return fixed
    check_bit_map(widths, experts.matrices)
    if fixed:
        raise ValueError("`override`: expected a budget to choose widths under, got a bit map: change that instead")
    return {}


def _least_bytes(job: Job, widths: Budget | Mapping[str, int], room: Room | None) -> int:
    """Bytes that the output takes, but for headers and small files; a room may have space for more than it takes."""
    if not isinstance(widths, Budget):
        return job.bytes_at(average_bits(widths, job.experts.matrices))
    return min(job.bytes_at(widths.widths[-1]), room.limit) if room else job.bytes_at(widths.average_bits)
