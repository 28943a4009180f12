"""The options that choose widths, shared by ``allocate`` and ``convert``."""

from __future__ import annotations

import argparse
from pathlib import Path

from offline.allocation.modes import GRANULARITIES
from offline.allocation.sizes import Room, fit_memory, target_size
from offline.allocation.widths import MODES, NOISE_KINDS, Budget, read_bit_map
from offline.progress import parse_bytes

_BUDGET = {
    "average_bits": "--bits",
    "widths": "--candidate-bits",
    "gamma": "--gamma",
    "noise": "--noise",
    "granularity": "--granularity",
    "shares": "--shares",
    "seed": "--seed",
}
_ROOM = {"target_size": "--target-size", "fit_memory": "--fit-memory"}
_MANUAL = "manual"
# What each mode makes use of.
_USED = {
    "alphaq": {"average_bits", "widths", "gamma", "noise", "granularity"},
    "uniform": {"average_bits", "widths"},
    "ratio": {"widths", "shares"},
    "random": {"average_bits", "widths", "granularity", "seed"},
}

_GAMMA = "exponent of importance (default auto: by the spread of alpha)"
_NOISE = (
    "error to minimise: propagated (default where the converter can run the model, or the statistics have it), of the "
    "layers' outputs, on text that the model writes itself; measured, of the weights; analytic, of the paper"
)
_RESERVE = "with --fit-memory, for KV cache, activations and vLLM itself (default a fifth of it)"
_SHARES = "of experts with the greatest and the least width in mode ratio (default 0.25,0.25)"


def add_choice_options(parser: argparse.ArgumentParser, bit_map: bool) -> None:
    """Add the options that ``widths_from`` (bit_map) or ``budget_from``, and ``room_from``, read."""
    # The defaults are Budget's; absent unless given, they show when another choice leaves them without effect.
    group = parser.add_argument_group("choice of widths", argument_default=argparse.SUPPRESS)
    either = group.add_mutually_exclusive_group()
    either.add_argument("--bits", dest="average_bits", type=float, metavar="AVERAGE", help="at most (default 3.5)")
    either.add_argument("--target-size", type=parse_bytes, metavar="SIZE", help="of all files together, at most")
    either.add_argument("--fit-memory", type=parse_bytes, metavar="SIZE", help="of all GPUs that will serve the model")
    if bit_map:
        either.add_argument(
            "--bit-map", type=Path, default=None, metavar="FILE", help='JSON file {"<matrix name>": bits}'
        )
    modes = (*MODES, _MANUAL) if bit_map else MODES
    group.add_argument("--reserve", type=parse_bytes, metavar="SIZE", help=_RESERVE)
    group.add_argument("--mode", choices=modes, help="how widths are chosen (default alphaq, or manual with a bit map)")
    group.add_argument("--candidate-bits", dest="widths", type=parse_widths, metavar="LIST", help="default 2,3,4")
    group.add_argument("--gamma", type=_gamma, metavar="auto|NUMBER", help=_GAMMA)
    group.add_argument("--noise", choices=NOISE_KINDS, help=_NOISE)
    group.add_argument("--granularity", choices=GRANULARITIES, help="what shares a width (default projection)")
    group.add_argument("--shares", type=_shares, metavar="TOP,BOTTOM", help=_SHARES)
    group.add_argument("--seed", type=int, help="of mode random (default 0)")


def widths_from(args: argparse.Namespace, noise: str = Budget.noise) -> Budget | dict[str, int]:
    """The bit map or else the budget that the options ask for; noise: unless they name one.

    Raises ValueError for options that contradict each other.
    """
    mode = getattr(args, "mode", _MANUAL if args.bit_map else "alphaq")
    if (mode == _MANUAL) != (args.bit_map is not None):
        raise ValueError(f"--mode {mode}: expected a bit map in mode {_MANUAL} and in no other: see --bit-map")
    if args.bit_map is None:
        return budget_from(args, noise)
    if given := [option for field, option in _BUDGET.items() if field in args]:
        raise ValueError(
            f"--bit-map: expected to be the only choice of widths, got also {', '.join(given)}: leave out one"
        )
    return read_bit_map(args.bit_map)


def budget_from(args: argparse.Namespace, noise: str = Budget.noise) -> Budget:
    """The budget that the options ask for; noise: unless they name one.

    Raises ValueError for options that the mode does not use.
    """
    mode = getattr(args, "mode", "alphaq")
    given = {field: getattr(args, field) for field in _BUDGET if field in args}
    unused = [_BUDGET[field] for field in given if field not in _USED[mode]]
    if "average_bits" not in _USED[mode]:
        unused += [option for field, option in _ROOM.items() if field in args]
    if unused:
        raise ValueError(f"--mode {mode}: expected only options that it uses, got also {', '.join(unused)}")
    if mode == "ratio" or any(field in args for field in _ROOM):
        # Something else decides on the average, so no candidates must be refused for it.
        given["average_bits"] = max(given.get("widths", Budget.widths))
    if mode == "alphaq":
        given.setdefault("noise", noise)
    return Budget(mode=mode, **given)


def room_from(args: argparse.Namespace) -> Room | None:
    """The room that the options set, if any."""
    if "reserve" in args and "fit_memory" not in args:
        raise ValueError("--reserve: expected together with --fit-memory, got no memory: add it or leave this out")
    if "target_size" in args:
        return target_size(args.target_size)
    return fit_memory(args.fit_memory, getattr(args, "reserve", None)) if "fit_memory" in args else None


def parse_widths(text: str) -> tuple[int, ...]:
    """Parse a list of widths.

    >>> parse_widths("4,2,3")
    (2, 3, 4)
    """
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected widths such as 2,3,4, got {text!r}") from None


def _gamma(text: str) -> float | None:
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected auto or a number, got {text!r}") from None


def _shares(text: str) -> tuple[float, float]:
    try:
        top, bottom = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two shares such as 0.25,0.25, got {text!r}") from None
    return top, bottom
