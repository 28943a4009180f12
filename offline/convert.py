"""``python -m offline.convert``: from a Hugging Face checkpoint to an AlphaQ checkpoint, without calibration data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from alphaq_vllm.format import SUPPORTED_BITS
from offline.cli import (
    Parser,
    add_choice_options,
    add_family,
    add_group_size,
    add_linear_bits,
    add_output_options,
    add_quantizer_options,
    add_revision,
    add_work_options,
    given,
    run,
)
from offline.operations.convert import convert

_DESCRIPTION = """Convert a Mixture-of-Experts checkpoint so that every expert matrix has a bit-width of its own.

The widths are chosen without calibration data, from the errors that quantization causes on text that the model writes
itself, so that their average keeps to a budget. With --effort 0 nothing runs the model: faster, and worse. That is the
default for models that the converter cannot run. --preset paper goes by the spectra of the weights, as AlphaQ's paper
does: measured worse. Everything but the routed experts is copied unchanged, unless --linear-bits quantizes attention,
shared experts and dense layers. The experts of layers for multi-token prediction get --mtp-bits, where vLLM's draft
models take these."""

_EXAMPLES = """\
  python -m offline.convert Qwen/Qwen1.5-MoE-A2.7B qwen-alphaq --bits 3.5
  python -m offline.convert ./mixtral ./mixtral-alphaq --bits 2.5 --candidate-bits 1,2,3,4
  python -m offline.convert ./mixtral ./mixtral-alphaq --fit-memory 24GiB --reserve 5GiB --dry-run
  python -m offline.convert ./model ./model-alphaq --override '*.layers.0.*=4' --exclude '*.layers.27.*'
  python -m offline.convert ./model ./model-uniform --mode uniform --bits 3
  python -m offline.convert ./model ./model-paper --preset paper --bits 3
  python -m offline.convert ./model ./model-alphaq --stats stats.csv --bits 3
  python -m offline.convert ./model ./model-alphaq --bit-map bit_map.json
  python -m offline.convert ./model ./model-alphaq --bits 3 --linear-bits 4 --head-bits 8"""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    args = build_parser().parse_args(arguments)
    summary = convert(args.model, args.out, **given(args, "model", "out"))
    print(json.dumps(summary.to_dict()) if args.json else summary)


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
        action="append",
        metavar="PATTERN=BITS",
        help="a width for all expert matrices whose names match, as file names do; may be repeated",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help="leave whole modules of experts as they are; may be repeated",
    )
    add_quantizer_options(parser)
    add_group_size(parser)
    add_revision(parser)
    add_family(parser)
    parser.add_argument(
        "--mtp-bits",
        type=int,
        choices=(16, *reversed(SUPPORTED_BITS)),
        help="of the experts of layers for multi-token prediction, where vLLM serves these quantized (default 4; 16: "
        "left alone)",
    )
    add_linear_bits(parser)
    parser.add_argument("--tp-size", type=int, metavar="N", help="refuse what N ranks could not share (default 1)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="measure and choose, unless told how, print what would come out, and write nothing",
    )
    add_work_options(parser)
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="that the conversion may take, about, such as 8GiB: fewer workers, and if one takes too much, fewer "
        "tokens (default: as many workers as there is memory for)",
    )
    add_output_options(parser)
    return parser


if __name__ == "__main__":
    run(main)
