"""What the commands share: how arguments are parsed and how errors end a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from offline.progress import parse_bytes
from offline.writer import DEFAULT_SHARD_BYTES


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
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def run(command: Callable[[Sequence[str]], None]) -> NoReturn:
    """Run a command on the process's arguments and exit: 0 on success, 2 with one line on stderr on an error."""
    try:
        command(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
