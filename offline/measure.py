"""``python -m offline.measure``: the statistics that widths are chosen by, in a file that can be used again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from offline.allocation.measure import measure
from offline.allocation.propagation import error_gains
from offline.allocation.splitting import check_group_size
from offline.allocation.stats import STATS, Origin, Statistics, read_statistics
from offline.allocation.widths import NOISE_KINDS, Budget, Choice
from offline.cli import Parser, add_group_size, add_json_option, run
from offline.options import parse_widths
from offline.quantizers.calibration import MAX_TOKENS
from offline.quantizers.decoder import can_run
from offline.quantizers.grids import GRIDS
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts
from offline.source.fingerprint import fingerprint
from offline.threads import choose_workers
from offline.writing.journal import Journal
from offline.writing.plan import Job, plan, quantized_specs

_DESCRIPTION = """Measure how heavy-tailed the spectrum of every expert matrix is (alpha), and its quantization error.

The table goes to a file from which `allocate` chooses widths in seconds, and which `convert --stats` accepts. A file
that is there already is used again if it is of the same source, settings and version, and refused otherwise."""

_EXAMPLES = """\
  python -m offline.measure Qwen/Qwen1.5-MoE-A2.7B -o stats.csv
  python -m offline.measure ./mixtral -o stats.csv --candidate-bits 1,2,3,4,5
  python -m offline.measure ./model -o stats.csv --noise analytic --json"""


def take_statistics(job: Job, widths: Sequence[int], journal: Journal | None = None, gains: bool = False) -> Statistics:
    """Measure all matrices of a job, and their errors at ``widths``; journal: see ``measure``; gains: also how errors
    propagate.
    """
    quantizer = job.data_free_quantizer
    matrices = measure(job.source, job.experts.matrices, widths, job.group_size, job.workers, journal, quantizer)
    if gains:
        gain = _error_gains(job, journal)
        matrices = [replace(matrix, gain=gain[matrix.name]) for matrix in matrices]
    origin = Origin(job.name, fingerprint(job.source), job.group_size, len(matrices), 0, 0, quantizer)
    # The longest names in the card, and 8 bits, because the numbers in headers have the most digits then.
    longest = replace(job, quantizer="gptq", calibration_tokens=MAX_TOKENS, own_text=True)
    eight = {matrix.name: 8 for matrix in matrices}
    text = str(Statistics(replace(origin, other_files=job.source.nbytes, other_tensors=job.source.nbytes), matrices))
    planned = plan(longest, Choice(eight, "alphaq", noise="propagated"), {STATS: text})
    specs = quantized_specs(job.experts.matrices, eight, job.group_size)
    experts = sum(spec.nbytes for spec in specs.values())
    others = sum(planned.sizes.values()) - experts
    return Statistics(replace(origin, other_files=others, other_tensors=planned.tensor_bytes - experts), matrices)


def _error_gains(job: Job, journal: Journal | None) -> dict[str, float]:
    """How errors propagate, also for experts that are left alone; journal: where that is kept, and found again."""
    known = [entry["gains"] for entry in journal.entries if "gains" in entry] if journal else []
    if known:
        return known[0]
    gains = error_gains(job.source, find_experts(job.source), job.group_size)
    if journal:
        journal.record({"gains": gains})
        journal.commit()
    return gains


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = Parser("measure", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("model", help="directory of a Hugging Face checkpoint, or name of a model on the Hub")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the table, as CSV")
    parser.add_argument(
        "--candidate-bits",
        type=parse_widths,
        default=Budget().widths,
        metavar="LIST",
        help="widths to measure the error of (default 2,3,4)",
    )
    parser.add_argument(
        "--noise",
        choices=NOISE_KINDS,
        help="propagated (default where the converter can run the model): also what errors cause at the outputs of "
        "layers; measured: errors of the weights alone; analytic: no errors",
    )
    parser.add_argument("--quantizer", choices=GRIDS, default="mse", help="whose error is measured (default mse)")
    add_group_size(parser)
    add_json_option(parser)
    parser.add_argument("--workers", type=int, metavar="N", help="processes to use (default: as many as help)")
    args = parser.parse_args(arguments)
    source = open_checkpoint(args.model)
    experts = find_experts(source)
    check_group_size(args.group_size, experts.matrices)
    noise = args.noise or ("propagated" if can_run(experts) else "measured")
    budget = Budget(average_bits=args.candidate_bits[0], widths=args.candidate_bits, noise=noise)
    reused = args.output.exists()
    if reused:
        statistics = read_statistics(args.output)
        expected = (fingerprint(source), args.group_size, budget.measured_widths, args.quantizer, budget.needs_gains)
        statistics.check(*expected)
    else:
        # Fails before the work rather than after it.
        args.output.touch()
        args.output.unlink()
        workers = choose_workers(args.workers, experts.numel)
        job = Job(args.model, source, experts, args.group_size, workers=workers, quantizer=args.quantizer)
        statistics = take_statistics(job, budget.measured_widths, gains=budget.needs_gains)
        args.output.write_text(str(statistics))
    _report(args.output, statistics, reused, args.json)


def _report(output: Path, statistics: Statistics, reused: bool, as_json: bool) -> None:
    alphas = [matrix.alpha for matrix in statistics.matrices]
    alpha = min(alphas), median(alphas), max(alphas)
    result = {
        "output": str(output),
        "reused": reused,
        "matrices": len(alphas),
        "widths": statistics.widths,
        "alpha": alpha,
    }
    if as_json:
        print(json.dumps(result))
    else:
        print(
            f"{output}: {'still valid for' if reused else 'statistics of'} {len(alphas)} matrices: "
            f"alpha {alpha[0]:.3f} to {alpha[2]:.3f}, median {alpha[1]:.3f}"
        )


if __name__ == "__main__":
    run(main)
