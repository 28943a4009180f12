"""``python -m offline.convert``: from a Hugging Face checkpoint to an AlphaQ checkpoint, without calibration data.

Everything that can be wrong with the arguments or the source is checked first. Then the expert matrices are measured,
their widths chosen, and the checkpoint quantized and written, with one matrix in memory at a time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from alphaq_vllm.format import LINEAR_BITS
from offline.allocation.selection import Selection, parse_override
from offline.allocation.sizes import Room
from offline.allocation.splitting import check_group_size
from offline.allocation.stats import read_statistics
from offline.allocation.widths import Budget, average_bits, average_left, check_bit_map
from offline.choosing import choose_widths
from offline.cli import Parser, add_group_size, add_output_options, add_work_options, run
from offline.options import add_choice_options, room_from, widths_from
from offline.quantizers.calibration import Calibration, add_quantizer_options, calibration_from, check_quantizer
from offline.quantizers.decoder import can_run
from offline.quantizers.linear import choose_formats, find_linear_layers
from offline.quantizers.sequential import SequentialGptq
from offline.source.checkpoint import open_checkpoint
from offline.source.families import Experts, find_experts
from offline.summary import Summary
from offline.threads import choose_workers
from offline.timing import estimate_seconds
from offline.writing.output import RESULTS, check_output, conditions, open_output
from offline.writing.plan import Job
from offline.writing.writer import DEFAULT_SHARD_BYTES

_DESCRIPTION = """Convert a Mixture-of-Experts checkpoint so that every expert matrix has a bit-width of its own.

The widths are chosen without calibration data, from the spectra of the weights and the errors that quantization causes
on text that the model writes itself, so that their average keeps to a budget. With --noise measured --quantizer mse
nothing runs the model: faster, and worse. Everything but the routed experts is copied unchanged, unless --linear-bits
quantizes attention, shared experts and dense layers too, for the kernels that vLLM has."""

_EXAMPLES = """\
  python -m offline.convert Qwen/Qwen1.5-MoE-A2.7B qwen-alphaq --bits 3.5
  python -m offline.convert ./mixtral ./mixtral-alphaq --bits 2.5 --candidate-bits 1,2,3,4
  python -m offline.convert ./mixtral ./mixtral-alphaq --fit-memory 24GiB --reserve 5GiB --dry-run
  python -m offline.convert ./model ./model-alphaq --override '*.layers.0.*=4' --exclude '*.layers.27.*'
  python -m offline.convert ./model ./model-uniform --mode uniform --bits 3
  python -m offline.convert ./model ./model-alphaq --stats stats.csv --bits 3
  python -m offline.convert ./model ./model-alphaq --bit-map bit_map.json
  python -m offline.convert ./model ./model-alphaq --bits 3 --linear-bits 4"""


def convert(
    model: str,
    out: Path,
    widths: Budget | Mapping[str, int],
    group_size: int = 128,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    *,
    selection: Selection = Selection(),  # noqa: B008 - frozen
    room: Room | None = None,
    tp_size: int = 1,
    linear_bits: int = 16,
    quantizer: str = "mse",
    calibration: Calibration | None = None,
    stats: Path | None = None,
    dry_run: bool = False,
    resume: bool = False,
    workers: int | None = None,
) -> Summary:
    """Convert a checkpoint.

    model: a directory or the name of a model on the Hugging Face Hub; out: a directory that is empty or does not
    exist; widths: a budget to choose them under, or bits by matrix name; group_size: input columns that share a scale
    and a zero point; max_shard_bytes: of data in one file; selection: experts that are left alone or have a width given
    by hand; room: takes the place of the budget's average; tp_size: ranks that the result must split among;
    linear_bits: of linear layers outside the experts, 16 to leave them alone; quantizer: of the experts, one of
    ``QUANTIZERS``; calibration: of gptq, None for text of the model's own; stats: a file of ``measure`` to choose by;
    dry_run: decide everything, estimate the time and write nothing; resume: take up what an interrupted run has left;
    workers: processes to use, None for as many as help.
    Raises ValueError or OSError for anything that is wrong, and then leaves no output.
    """
    start = time.monotonic()
    check_quantizer(quantizer, calibration)
    source = open_checkpoint(model)
    every_expert = find_experts(source)
    experts = selection.quantized(every_expert)
    check_group_size(group_size, experts.matrices, tp_size)
    fixed = _check_widths(widths, experts, selection, room)
    workers = choose_workers(workers, experts.numel)
    layers = find_linear_layers(source, experts) if linear_bits < 16 else []
    linear = choose_formats(layers, linear_bits, group_size, tp_size)
    job = Job(model, source, experts, group_size, max_shard_bytes, workers, linear)
    gptq = SequentialGptq(source, every_expert, calibration or Calibration()) if quantizer == "gptq" else None
    job = replace(job, quantizer=quantizer)
    if gptq:
        job = replace(job, calibration_tokens=gptq.tokens, own_text=gptq.own_text)
    out = out.resolve()
    # The results of gptq lie beside the checkpoint until that is complete.
    needed_bytes = _least_bytes(job, widths, room) * (2 if gptq else 1)
    check_output(out, source.path.resolve(), needed_bytes, resume)
    given = read_statistics(stats) if stats else None
    settings = {
        "widths": asdict(widths) if isinstance(widths, Budget) else widths,
        "group_size": group_size,
        "quantizer": quantizer,
        "calibration": gptq.digest if gptq else None,
        "linear": {layer.name: asdict(stored) for layer, stored in linear.items()},
        "max_shard_bytes": max_shard_bytes,
        "selection": asdict(selection),
        "room": asdict(room) if room else None,
        "stats": given.digest if given else None,
    }
    if dry_run:
        plan = choose_widths(job, widths, fixed, room, given)
        left = gptq.estimate_seconds(plan.bits, group_size, workers) if gptq else estimate_seconds(plan)
        seconds = time.monotonic() - start + left
    else:
        with open_output(out, conditions(source, settings), resume) as output:
            results = output.directory.with_name(RESULTS) if gptq else None
            plan = choose_widths(replace(job, calibrated=results), widths, fixed, room, given, output.journal)
            if gptq and results:
                starved = gptq.run(plan.bits, group_size, results, workers)
                plan = replace(plan, summary=replace(plan.summary, starved=starved))
            plan.write(output)
        seconds = time.monotonic() - start
    limit = str(room) if room else None
    return replace(plan.summary, output=str(out), room=limit, seconds=seconds, dry_run=dry_run)


def main(arguments: Sequence[str]) -> None:
    """The command."""
    args = build_parser().parse_args(arguments)
    runs = can_run(find_experts(open_checkpoint(args.model)))
    propagated = read_statistics(args.stats).has_gains if args.stats else runs
    widths, room = widths_from(args, "propagated" if propagated else "measured"), room_from(args)
    summary = convert(
        args.model,
        args.out,
        widths,
        args.group_size,
        args.max_shard_size,
        selection=Selection(tuple(args.exclude), tuple(args.override)),
        room=room,
        tp_size=args.tp_size,
        linear_bits=args.linear_bits,
        quantizer=getattr(args, "quantizer", "gptq" if runs else "mse"),
        calibration=calibration_from(args),
        stats=args.stats,
        dry_run=args.dry_run,
        resume=args.resume,
        workers=args.workers,
    )
    print(json.dumps(summary.to_dict()) if args.json else summary)


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
        raise ValueError("--override: expected a budget to choose widths under, got a bit map: change that instead")
    return {}


def _least_bytes(job: Job, widths: Budget | Mapping[str, int], room: Room | None) -> int:
    """Bytes that the output takes, but for headers and small files; a room may have space for more than it takes."""
    if not isinstance(widths, Budget):
        return job.bytes_at(average_bits(widths, job.experts.matrices))
    return min(job.bytes_at(widths.widths[-1]), room.limit) if room else job.bytes_at(widths.average_bits)


def build_parser() -> Parser:
    """The arguments."""
    parser = Parser("convert", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("model", help="directory of a Hugging Face checkpoint, or name of a model on the Hub")
    parser.add_argument("out", type=Path, help="output directory: new or empty")
    add_choice_options(parser, bit_map=True)
    parser.add_argument(
        "--stats", type=Path, metavar="FILE", help="statistics that `measure` wrote of it, to choose by"
    )
    parser.add_argument(
        "--override",
        type=parse_override,
        action="append",
        default=[],
        metavar="PATTERN=BITS",
        help="a width for all expert matrices whose names match, as file names do; may be repeated",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave whole modules of experts as they are; may be repeated",
    )
    add_quantizer_options(parser)
    add_group_size(parser)
    parser.add_argument(
        "--linear-bits",
        type=int,
        choices=(16, *reversed(LINEAR_BITS)),
        default=16,
        help="of attention, shared experts and dense layers (default 16: left alone); vLLM's CPU build serves 16 and 4",
    )
    parser.add_argument("--tp-size", type=int, default=1, metavar="N", help="refuse what N ranks could not share")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="measure and choose, unless told how, print what would come out, and write nothing",
    )
    add_work_options(parser)
    add_output_options(parser)
    return parser


if __name__ == "__main__":
    run(main)
