"""``python -m offline.validate``: whether a finished AlphaQ checkpoint is whole, and true to its source."""

from __future__ import annotations

import json
from collections.abc import Sequence

from offline.cli import Parser, add_json_option, run
from offline.operations.validate import validate

_DESCRIPTION = """Read an AlphaQ checkpoint completely, and check it.

Every file must have its SHA-256 sum, every tensor the name, shape and dtype that format and config promise, and every
number must be finite. With --source, every quantized matrix must be as near to the source's as its width allows, and
all else equal to the source bit for bit. The exit status is 0 if all is well."""

_EXAMPLES = """\
  python -m offline.validate ./model-alphaq
  python -m offline.validate ./model-alphaq --source ./model --json"""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = Parser("validate", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("checkpoint", help="directory of an AlphaQ checkpoint, or name of one on the Hub")
    parser.add_argument("--source", default=None, metavar="MODEL", help="the model that it was converted from")
    parser.add_argument("--revision", default=None, metavar="NAME", help="branch, tag or commit of a source on the Hub")
    add_json_option(parser)
    args = parser.parse_args(arguments)
    result = validate(args.checkpoint, args.source, revision=args.revision)
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"{result['checkpoint']}: ok: {result['files']} files, {result['tensors']} tensors, "
        f"{result['matrices']} expert matrices, {result['linear_layers']} linear layers"
    )
    if result["found"]:
        print(result["found"])
    for num_bits, error in result["errors"].items():
        print(f"{num_bits:3} bits: {error['matrices']} matrices, relative squared error {error['relative_mse']:.3g}")
    if args.source:
        print("everything else is equal to the source")


if __name__ == "__main__":
    run(main)
