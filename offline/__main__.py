"""The console script ``alphaq``: ``alphaq NAME ...`` is ``python -m offline.NAME ...``."""

from __future__ import annotations

import sys
from importlib import import_module

from offline.cli import run

# What each command does and the module that has it. Only the one that is called is imported.
_COMMANDS = {
    "plan": ("what converting and serving a model will take, before it is downloaded", "offline.plan"),
    "measure": ("statistics of a model's expert matrices", "offline.measure"),
    "allocate": ("widths from statistics, under a budget", "offline.allocate"),
    "convert": ("a model into an AlphaQ checkpoint", "offline.convert"),
    "inspect": ("what a checkpoint is made of", "offline.inspect"),
    "validate": ("whether a checkpoint is whole and true to its source", "offline.validate"),
    "dequantize": ("an AlphaQ checkpoint into an ordinary one", "offline.dequantize"),
    "upload": ("an AlphaQ checkpoint to the Hugging Face Hub", "offline.upload"),
}


def main() -> None:
    """Run the command that the first argument names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {command:12}{what}" for command, (what, _) in _COMMANDS.items()]
        print("usage: alphaq COMMAND ...", "", *lines, "", "Each has --help with examples.", sep="\n")
    elif name in _COMMANDS:
        run(import_module(_COMMANDS[name][1]).main, arguments)
    else:
        print(f"error: expected a command out of {', '.join(_COMMANDS)}, got {name!r}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
