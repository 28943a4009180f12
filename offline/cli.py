"""What the commands share: their arguments, how those become options, and how errors end a command."""

from __future__ import annotations

import argparse
import errno
import re
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

import torch

from alphaq_vllm.format import LINEAR_BITS, SUPPORTED_GROUP_SIZES
from offline.allocation.modes import GRANULARITIES
from offline.allocation.widths import MODES, NOISE_KINDS
from offline.model.text import FEW_PER_FEATURE, MANY_TOKENS, MAX_TOKENS, TOKENS_PER_FEATURE, Calibration
from offline.operations.options import EFFORT_TIMES, EFFORTS, MANUAL
from offline.operations.width_options import PRESETS
from offline.quantizers.quantize import QUANTIZERS
from offline.source.linear import UNQUANTIZED

_NOISE = (
    "error to minimise: propagated (default where the converter can run the model, or the statistics have it), of the "
    "layers' outputs, on text that the model writes itself; expert (default elsewhere), of an "
    "expert's output for random inputs; measured, of the weights; analytic, of the paper"
)
_PRESET = (
    "paper: mode, gamma, noise and granularity as in AlphaQ's paper, from the spectra of the weights alone; measured "
    "worse than the default"
)
_RESERVE = "with --fit-memory, for KV cache, activations and vLLM itself (default a fifth of it)"
_SHARES = "of experts with the greatest and the least width in mode ratio (default 0.25,0.25)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors and whose help keeps its examples' lines.

    Arguments that are not given are absent from the result: the defaults are those of the operations' options.

    name: of the command; summary: what it does; examples: command lines for the help.
    """

    def __init__(self, name: str, summary: str, examples: str) -> None:
        super().__init__(
            prog=f"python -m offline.{name}",
            description=summary,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise ValueError(f"{message} (see {self.prog} --help)")


def given(args: argparse.Namespace, *others: str) -> dict[str, Any]:
    """The options that were given, by field; others: arguments that are not options."""
    return {name: value for name, value in vars(args).items() if name not in (*others, "json")}


def add_choice_options(parser: argparse.ArgumentParser, bit_map: bool) -> None:
    """Add the fields of ``WidthOptions``; bit_map: and that of ``ConvertOptions`` which takes their place."""
    group = parser.add_argument_group("choice of widths")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--bits", metavar="AVERAGE", help="at most (default 3.5)")
    either.add_argument("--target-size", metavar="SIZE", help="of all files together, at most")
    either.add_argument("--fit-memory", metavar="SIZE", help="of all GPUs that will serve the model")
    if bit_map:
        either.add_argument("--bit-map", type=Path, metavar="FILE", help='JSON file {"<matrix name>": bits}')
    modes = (*MODES, MANUAL) if bit_map else MODES
    group.add_argument("--reserve", metavar="SIZE", help=_RESERVE)
    group.add_argument("--preset", choices=PRESETS, help=_PRESET)
    group.add_argument("--mode", choices=modes, help="how widths are chosen (default alphaq, or manual with a bit map)")
    group.add_argument("--candidate-bits", metavar="LIST", help="default 2,3,4")
    group.add_argument(
        "--gamma",
        metavar="auto|NUMBER",
        help="exponent of importance (default auto: 0, which leaves alpha out, beside noise propagated and expert)",
    )
    group.add_argument("--noise", choices=NOISE_KINDS, help=_NOISE)
    group.add_argument("--granularity", choices=GRANULARITIES, help="what shares a width (default projection)")
    group.add_argument("--shares", metavar="TOP,BOTTOM", help=_SHARES)
    group.add_argument("--seed", help="of mode random (default 0)")


def add_quantizer_options(parser: argparse.ArgumentParser) -> None:
    """Add the quantizer, and the text that it may need."""
    group = parser.add_argument_group("quantizer")
    group.add_argument(
        "--effort",
        type=int,
        choices=EFFORTS,
        help="0: as by default for models that the converter cannot run, the fastest and worse; 1 (default); 2: "
        f"{EFFORT_TIMES} times the text for gptq, where experts are large",
    )
    group.add_argument(
        "--quantizer",
        choices=QUANTIZERS,
        help="gptq (default where the converter can run the model): least error of what the model computes; mse "
        "(default elsewhere): least squared error; rtn: round to nearest; hqq: half-quadratic",
    )
    group.add_argument(
        "--calibration", nargs="+", metavar="FILE", help="text for gptq (default: what the model writes itself)"
    )
    group.add_argument(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help=f"to use at most (default {TOKENS_PER_FEATURE} for each input feature of an expert up to {MANY_TOKENS}, "
        f"and {FEW_PER_FEATURE} up to {MAX_TOKENS}); each takes 12 bytes of memory times the hidden size",
    )
    group.add_argument(
        "--calibration-length",
        type=int,
        metavar="N",
        help=f"tokens that the model sees together (default {Calibration.length})",
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command that writes a checkpoint offers."""
    parser.add_argument("--max-shard-size", metavar="SIZE", help="of a file (default 4GiB)")
    add_json_option(parser)


def add_work_options(parser: argparse.ArgumentParser) -> None:
    """Add how the work of a long command is done, which changes no result."""
    parser.add_argument("--resume", action="store_true", help="continue what an interrupted run has left")
    add_workers(parser)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the number of processes."""
    parser.add_argument("--workers", type=int, metavar="N", help="processes to use (default: as many as help)")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add what every command offers."""
    parser.add_argument("--json", action="store_true", default=False, help="print the result as one JSON object")


def add_revision(parser: argparse.ArgumentParser) -> None:
    """Add which state of a model on the Hub is meant."""
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model on the Hub")


def add_family(parser: argparse.ArgumentParser) -> None:
    """Add whose experts have the same names, for a type of model that is not in the table of families."""
    parser.add_argument(
        "--family", metavar="TYPE", help="type of model whose experts have the same names (default: found by them)"
    )


def add_group_size(parser: argparse.ArgumentParser) -> None:
    """Add the group size."""
    parser.add_argument("--group-size", type=int, choices=SUPPORTED_GROUP_SIZES, help="of experts (default 64)")


def add_linear_bits(parser: argparse.ArgumentParser) -> None:
    """Add the widths of what is no expert."""
    widths = (UNQUANTIZED, *reversed(LINEAR_BITS))
    for name, what in (("linear", "attention, shared experts and dense layers"), ("head", "what predicts tokens")):
        parser.add_argument(f"--{name}-bits", type=int, choices=widths, help=f"of {what} (default 16: left alone)")


def run(command: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command on arguments, by default the process's, and exit: 0 on success, 2 with one line on stderr on an
    error.
    """
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        # A letter in a path that the terminal's encoding lacks must not fail a command that has done its work.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command(sys.argv[1:] if arguments is None else arguments)
    except (ValueError, OSError) as error:
        too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
        way_out = ": choose a name of at most 255 bytes" if too_long else ""
        print(f"error: {spelled(str(error))}{way_out}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print(
            f"error: memory ran out: {' '.join(str(error).split()):.200}: set --workers lower or end other programs, "
            "and continue with --resume where the command has that",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"error: {spelled(str(error)) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def spelled(message: str) -> str:
    """A message with the fields of options as the command line spells them.

    >>> spelled("`candidate_bits`: expected three with `mode=ratio`")
    '--candidate-bits: expected three with --mode ratio'
    """

    def option(match: re.Match[str]) -> str:
        value = f" {match[2]}" if match[2] else ""
        return f"--{match[1].replace('_', '-')}{value}"

    return re.sub(r"`([a-z_]+)(?:=([^`]+))?`", option, message)


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    # For a CPU, torch raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
