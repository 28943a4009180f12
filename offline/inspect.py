"""``python -m offline.inspect``: what an AlphaQ checkpoint is made of, as tables and as pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offline.cli import Parser, add_json_option, run
from offline.operations.inspect import inspect
from offline.operations.summary import histogram
from offline.progress import format_bytes
from offline.sensitivity.stats import STATS

_DESCRIPTION = """Show what an AlphaQ checkpoint is made of: sizes, the widths by layer and projection, and, where the
statistics are with it, widths against alpha. --plot draws alpha and bits over layers and experts."""

_EXAMPLES = """\
  python -m offline.inspect ./model-alphaq
  python -m offline.inspect ./model-alphaq --plot maps.png
  python -m offline.inspect ./model-alphaq --json"""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = Parser("inspect", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("checkpoint", help="directory of an AlphaQ checkpoint, or name of one on the Hub")
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE", help="draw heat maps, as PNG, PDF or SVG")
    add_json_option(parser)
    args = parser.parse_args(arguments)
    result = inspect(args.checkpoint, args.plot)
    print(json.dumps(result) if args.json else _text(result))


def _text(result: Mapping[str, Any]) -> str:
    widths = list(result["widths"])
    lines = [
        f"{result['checkpoint']}: {result['model_type']}, AlphaQ format {result['format_version']}, "
        f"groups of {result['group_size']}, {format_bytes(result['size'])}",
        f"{result['matrices']} matrices, {result['bits']:.4f} bits on average by codes, "
        f"{result['stored_bits']:.4f} as stored",
        *(f"{number} more that only draft, of {width} bits" for width, number in result["drafts"].items()),
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
