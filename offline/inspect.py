"""``python -m offline.inspect``: what an AlphaQ checkpoint is made of, as tables and as pictures."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from alphaq_vllm.format import FORMAT_VERSION, AlphaQSpec, stored_bits_per_weight
from offline.allocation.stats import STATS, read_statistics
from offline.allocation.widths import average_bits
from offline.cli import Parser, add_json_option, run
from offline.heatmaps import check_plot, draw
from offline.progress import format_bytes
from offline.source.checkpoint import Checkpoint, open_checkpoint
from offline.source.families import ExpertMatrix
from offline.summary import count_widths, histogram
from offline.validate import check_alphaq

_DESCRIPTION = """Show what an AlphaQ checkpoint is made of: sizes, the widths by layer and projection, and, where the
statistics are with it, widths against alpha. --plot draws alpha and bits over layers and experts."""

_EXAMPLES = """\
  python -m offline.inspect ./model-alphaq
  python -m offline.inspect ./model-alphaq --plot maps.png
  python -m offline.inspect ./model-alphaq --json"""


def inspect(checkpoint: Checkpoint, widths: Mapping[ExpertMatrix, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Describe a checkpoint.

    widths: of its matrices; alphas: by matrix name, empty if they are not known.
    """
    bits = {matrix.name: num_bits for matrix, num_bits in widths.items()}
    group_size = AlphaQSpec.from_dict(checkpoint.config["quantization_config"]).group_size
    average = average_bits(bits, list(widths))
    rows: dict[tuple[str, str], list[ExpertMatrix]] = defaultdict(list)
    for matrix in widths:
        rows[matrix.module, matrix.projection].append(matrix)
    return {
        "checkpoint": str(checkpoint.path),
        "model_type": checkpoint.config.get("model_type"),
        "format_version": FORMAT_VERSION,
        "group_size": group_size,
        "matrices": len(widths),
        "bits": average,
        "stored_bits": stored_bits_per_weight(average, group_size),
        "size": checkpoint.nbytes,
        "widths": count_widths(bits),
        "layers": [
            {
                "module": module,
                "projection": projection,
                "bits": average_bits(bits, matrices),
                "widths": count_widths({matrix.name: bits[matrix.name] for matrix in matrices}),
                "alpha": median(alphas[matrix.name] for matrix in matrices) if alphas else None,
            }
            for (module, projection), matrices in rows.items()
        ],
        "alpha": _alpha_by_width(bits, alphas),
    }


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = Parser("inspect", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("checkpoint", help="directory of an AlphaQ checkpoint, or name of one on the Hub")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw heat maps, as PNG, PDF or SVG")
    add_json_option(parser)
    args = parser.parse_args(arguments)
    if args.plot:
        check_plot(args.plot)
    checkpoint = open_checkpoint(args.checkpoint)
    widths = check_alphaq(checkpoint)
    alphas = _alphas(checkpoint, widths)
    if args.plot:
        draw(args.plot, widths, alphas)
    result = inspect(checkpoint, widths, alphas)
    print(json.dumps(result) if args.json else _text(result))


def _alphas(checkpoint: Checkpoint, widths: Mapping[ExpertMatrix, int]) -> dict[str, float]:
    path = checkpoint.path / STATS
    if not path.exists():
        return {}
    return {stats.name: stats.alpha for stats in read_statistics(path).of(matrix.name for matrix in widths)}


def _alpha_by_width(bits: Mapping[str, int], alphas: Mapping[str, float]) -> dict[int, tuple[float, float, float]]:
    """The least, median and greatest alpha of the matrices of each width."""
    groups: dict[int, list[float]] = defaultdict(list)
    for name, alpha in alphas.items():
        groups[bits[name]].append(alpha)
    return {width: (min(group), median(group), max(group)) for width, group in sorted(groups.items())}


def _text(result: Mapping[str, Any]) -> str:
    widths = list(result["widths"])
    lines = [
        f"{result['checkpoint']}: {result['model_type']}, AlphaQ format {result['format_version']}, "
        f"groups of {result['group_size']}, {format_bytes(result['size'])}",
        f"{result['matrices']} matrices, {result['bits']:.4f} bits on average by codes, "
        f"{result['stored_bits']:.4f} as stored",
        *histogram(result["widths"]),
        "",
        f"{'module':44} {'projection':10}" + "".join(f"{f'{width}b':>6}" for width in widths) + "   average   alpha",
    ]
    for row in result["layers"]:
        counts = "".join(f"{row['widths'].get(width, 0) or '.':>6}" for width in widths)
        alpha = f"{row['alpha']:8.3f}" if row["alpha"] is not None else ""
        lines.append(f"{row['module']:44} {row['projection']:10}{counts}  {row['bits']:8.3f}{alpha}")
    if not result["alpha"]:
        return "\n".join([*lines, "", f"alpha is not known: no {STATS} is with the checkpoint"])
    lines += ["", "  bits   least alpha   median   greatest"]
    return "\n".join(
        [*lines, *(f"{b:6} {low:13.3f} {mid:8.3f} {high:10.3f}" for b, (low, mid, high) in result["alpha"].items())]
    )


if __name__ == "__main__":
    run(main)
