"""``python -m offline.allocate``: from the statistics of a model to a width for every expert matrix, in seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alphaq_vllm.format import stored_bits_per_weight
from offline.allocation.bit_map import average_bits
from offline.allocation.widths import Choice
from offline.cli import Parser, add_choice_options, add_json_option, given, run
from offline.operations.allocate import allocate
from offline.operations.summary import count_widths, histogram
from offline.operations.width_options import WidthOptions
from offline.progress import format_bytes
from offline.sensitivity.stats import Statistics, read_statistics

_DESCRIPTION = """Choose a width for every expert matrix from the statistics that `measure` wrote.

The result is a JSON object {"<matrix name>": bits}, which `convert --bit-map` takes as it is or edited by hand. The
average of bits is weighted by the matrices' numbers of weights."""

_EXAMPLES = """\
  python -m offline.allocate stats.csv --bits 3.5 -o bit_map.json
  python -m offline.allocate stats.csv --bits 2.5 --candidate-bits 1,2,3,4 --gamma 12 --granularity expert -o map.json
  python -m offline.allocate stats.csv --target-size 12GiB -o bit_map.json
  python -m offline.allocate stats.csv --mode random --seed 7 --bits 3 -o bit_map.json"""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = Parser("allocate", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("stats", type=Path, help="statistics that `measure` wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the bit map, as JSON")
    add_choice_options(parser, bit_map=False)
    add_json_option(parser)
    args = parser.parse_args(arguments)
    statistics, options = read_statistics(args.stats), given(args, "stats", "output")
    choice = allocate(statistics, args.output, **options)
    room = WidthOptions(**options).room()
    result = {**_result(statistics, choice, args.output), "room": str(room) if room else None}
    print(json.dumps(result) if args.json else _text(result))


def _result(statistics: Statistics, choice: Choice, output: Path) -> dict[str, Any]:
    origin = statistics.origin
    bits = average_bits(choice.bits, statistics.matrices)
    numel = sum(matrix.numel for matrix in statistics.matrices)
    experts = round(numel * stored_bits_per_weight(bits, origin.group_size) / 8)
    return {
        "output": str(output),
        "source": origin.source,
        "mode": choice.mode,
        "matrices": len(choice.bits),
        "bits": bits,
        "stored_bits": stored_bits_per_weight(bits, origin.group_size),
        "size": origin.other_files + experts,
        "memory": origin.other_tensors + experts,
        "widths": count_widths(choice.bits),
        "gamma": choice.gamma,
        "objective": choice.cost,
        "gap": choice.gap,
    }


def _text(result: dict[str, Any]) -> str:
    rows = [
        ("average bits", f"{result['bits']:.4f} by codes, {result['stored_bits']:.4f} as stored"),
        ("whole checkpoint", f"about {format_bytes(result['size'])}, {format_bytes(result['memory'])} when loaded"),
    ]
    if result["room"]:
        rows.append(("room", result["room"]))
    if result["gap"] is not None:
        rows += [
            ("gamma", f"{result['gamma']:.4g}"),
            ("objective", f"{result['objective']:.6g}"),
            ("optimality gap", f"{result['gap']:.2g} of the objective, proven"),
        ]
    rows.append(("written", str(result["output"])))
    return "\n".join([*histogram(result["widths"]), *(f"{name + ':':18}{value}" for name, value in rows)])


if __name__ == "__main__":
    run(main)
