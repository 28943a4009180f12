"""``python -m offline.dequantize``: an ordinary checkpoint with exactly the values that an AlphaQ checkpoint means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from offline.cli import Parser, add_output_options, add_work_options, given, run
from offline.operations.dequantize import dequantize
from offline.operations.summary import beside
from offline.progress import format_bytes

_DESCRIPTION = """Turn an AlphaQ checkpoint back into an ordinary one, so that any other program can check it.

A weight is scale * step * (code - zero_point), computed in float32. With --dtype float32 it is stored as computed;
float16 and bfloat16 round it once. All other tensors are copied unchanged."""

_EXAMPLES = """\
  python -m offline.dequantize ./model-alphaq ./model-dequantized
  python -m offline.dequantize ./model-alphaq ./model-float32 --dtype float32"""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = Parser("dequantize", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("checkpoint", help="directory of an AlphaQ checkpoint, or name of one on the Hub")
    parser.add_argument("out", type=Path, help="output directory: new or empty")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="of expert weights (default auto: the config's)",
    )
    add_work_options(parser)
    add_output_options(parser)
    args = parser.parse_args(arguments)
    result = dequantize(args.checkpoint, args.out, **given(args, "checkpoint", "out"))
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['output']}: {result['matrices']} expert matrices in {result['dtype']}, "
            f"{format_bytes(result['size_before'])} -> {format_bytes(result['size_after'])}, {result['seconds']:.1f} s"
        )
        for name, what in beside(result["code"], result["left"]):
            print(f"{name}: {what}")


if __name__ == "__main__":
    run(main)
