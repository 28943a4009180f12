"""What the commands share: how arguments are parsed and how errors end a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from alphaq_vllm.format import SUPPORTED_GROUP_SIZES
from offline.progress import parse_bytes
from offline.writing.writer import DEFAULT_SHARD_BYTES


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors and whose help keeps its examples' lines.

    name: of the command; summary: what it does; examples: command lines for the help.
    """

    def __init__(self, name: str, summary: str, examples: str) -> None:
        super().__init__(
            prog=f"python -m offline.{name}",
            description=summary,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise ValueError(f"{message} (see {self.prog} --help)")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command that writes a checkpoint offers."""
    parser.add_argument(
        "--max-shard-size",
        type=parse_bytes,
        default=DEFAULT_SHARD_BYTES,
        metavar="SIZE",
        help="of a file (default 4GiB)",
    )
    add_json_option(parser)


def add_work_options(parser: argparse.ArgumentParser) -> None:
    """Add how the work of a long command is done, which changes no result."""
    parser.add_argument("--resume", action="store_true", help="continue what an interrupted run has left")
    parser.add_argument("--workers", type=int, metavar="N", help="processes to use (default: as many as help)")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add what every command offers."""
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def add_group_size(parser: argparse.ArgumentParser) -> None:
    """Add the group size."""
    parser.add_argument("--group-size", type=int, choices=SUPPORTED_GROUP_SIZES, default=128, help="default 128")


def run(command: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command on arguments, by default the process's, and exit: 0 on success, 2 with one line on stderr on an
    error.
    """
    try:
        command(sys.argv[1:] if arguments is None else arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
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
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    # For a CPU, torch raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
