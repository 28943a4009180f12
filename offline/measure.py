"""``python -m offline.measure``: the statistics that widths are chosen by, in a file that can be used again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from offline.allocation.widths import NOISE_KINDS
from offline.cli import Parser, add_family, add_group_size, add_json_option, add_revision, add_workers, given, run
from offline.operations.measure import measure
from offline.quantizers.grids import GRIDS

_DESCRIPTION = """Measure how heavy-tailed the spectrum of every expert matrix is (alpha), and its quantization error.

The table goes to a file from which `allocate` chooses widths in seconds, and which `convert --stats` accepts. A file
that is there already is used again if it is of the same source, settings and version, and refused otherwise."""

_EXAMPLES = """\
  python -m offline.measure Qwen/Qwen1.5-MoE-A2.7B -o stats.csv
  python -m offline.measure ./mixtral -o stats.csv --candidate-bits 1,2,3,4,5
  python -m offline.measure ./model -o stats.csv --noise analytic --json"""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = Parser("measure", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("model", help="directory of a Hugging Face checkpoint, or name of a model on the Hub")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the table, as CSV")
    parser.add_argument("--candidate-bits", metavar="LIST", help="widths to measure the error of (default 2,3,4)")
    parser.add_argument(
        "--noise",
        choices=NOISE_KINDS,
        help="propagated (default where the converter can run the model): also what errors cause at the outputs of "
        "layers; measured: errors of the weights alone; analytic: no errors",
    )
    parser.add_argument("--quantizer", choices=GRIDS, help="whose error is measured (default mse)")
    add_group_size(parser)
    add_revision(parser)
    add_family(parser)
    add_workers(parser)
    add_json_option(parser)
    args = parser.parse_args(arguments)
    statistics = measure(args.model, args.output, **given(args, "model", "output"))
    alphas = [matrix.alpha for matrix in statistics.matrices]
    least, middle, greatest = min(alphas), median(alphas), max(alphas)
    reused = statistics.path is not None
    if args.json:
        result = {
            "output": str(args.output),
            "reused": reused,
            "matrices": len(alphas),
            "widths": statistics.widths,
            "alpha": (least, middle, greatest),
        }
        print(json.dumps(result))
    else:
        print(
            f"{args.output}: {'still valid for' if reused else 'statistics of'} {len(alphas)} matrices: "
            f"alpha {least:.3f} to {greatest:.3f}, median {middle:.3f}"
        )


if __name__ == "__main__":
    run(main)
