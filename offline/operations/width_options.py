"""What a user may decide of the widths of expert matrices; see ``options`` for the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from offline.allocation.sizes import Room, fit_memory, target_size
from offline.allocation.widths import MODES, Budget
from offline.progress import parse_bytes

Number = TypeVar("Number", int, float)

# The fields that are the budget's, with its names for them, and those that each mode makes use of.
BUDGET_FIELDS = {
    "bits": "average_bits",
    "candidate_bits": "widths",
    "gamma": "gamma",
    "noise": "noise",
    "granularity": "granularity",
    "shares": "shares",
    "seed": "seed",
}
_USED = {
    "alphaq": {"bits", "candidate_bits", "gamma", "noise", "granularity"},
    "uniform": {"bits", "candidate_bits"},
    "ratio": {"candidate_bits", "shares"},
    "random": {"bits", "candidate_bits", "granularity", "seed"},
}
# Settings that go by a name: the paper's are those of AlphaQ, arXiv 2606.04980.
PRESETS = {"paper": {"mode": "alphaq", "gamma": "auto", "noise": "analytic", "granularity": "projection"}}


@dataclass(frozen=True, kw_only=True)
class WidthOptions:
    """How the widths of expert matrices are chosen; None leaves a field to its default.

    Attributes:
        bits: Greatest average width, weighted by the matrices' numbers of weights; by default 3.5.
        target_size: Greatest size of all files together, in its place.
        fit_memory: Memory of all GPUs that will serve the model, in its place.
        reserve: Of ``fit_memory``, for KV cache, activations and vLLM itself; by default a fifth.
        preset: ``paper`` sets mode, gamma, noise and granularity as the paper has them: widths from the spectra of the
            weights alone. Measured worse than the default on all models that were measured.
        mode: ``alphaq`` (the default), ``uniform``, ``ratio`` or ``random``.
        candidate_bits: The widths to choose from, 1 to 8; by default 2, 3 and 4.
        gamma: Exponent of importance, or ``auto`` (the default): 0, which leaves alpha out, beside ``noise=propagated``
            and ``noise=expert``, else by the spread of alpha.
        noise: The error to minimise: ``propagated`` to the layers' outputs on text that the model writes itself (the
            default where the converter can run the model), to the output of an ``expert`` for random inputs (the
            default elsewhere), ``measured`` of the weights, or the paper's ``analytic``.
        granularity: What shares a width: a ``projection`` (the default) or an ``expert``.
        shares: Of the experts with the greatest and the least width in mode ``ratio``; by default 0.25 and 0.25.
        seed: Of mode ``random``; by default 0.

    Raises:
        ValueError: For a value that a field does not take, and for fields that contradict each other.
    """

    bits: float | str | None = None
    target_size: int | str | None = None
    fit_memory: int | str | None = None
    reserve: int | str | None = None
    preset: str | None = None
    mode: str | None = None
    candidate_bits: Sequence[int] | int | str | None = None
    gamma: float | str | None = None
    noise: str | None = None
    granularity: str | None = None
    shares: Sequence[float] | str | None = None
    seed: int | str | None = None

    def __post_init__(self) -> None:
        self.budget()
        self.room()

    def budget(self, propagates: bool = False) -> Budget:
        """The budget; propagates: whether the errors of layers' outputs can be had, which decides the defaults.

        Of what the weights alone say, only what errors do to the expert's output beat uniform widths on all three
        models that were measured (docs/quality.md).
        """
        given = self._preset() | {
            field: value for field in BUDGET_FIELDS if (value := getattr(self, field)) is not None
        }
        mode = given.pop("mode", "alphaq") if self.mode is None else self.mode
        if mode not in MODES:
            raise ValueError(f"`mode`: expected one of {', '.join(MODES)}, got {mode!r}")
        rooms = [field for field in ("target_size", "fit_memory") if getattr(self, field) is not None]
        unused = [field for field in given if field not in _USED[mode]] + ([] if "bits" in _USED[mode] else rooms)
        if unused:
            names = ", ".join(f"`{field}`" for field in unused)
            raise ValueError(f"`mode={mode}`: expected only options that it uses, got also {names}")
        arguments: dict[str, Any] = {BUDGET_FIELDS[field]: _READ[field](field, value) for field, value in given.items()}
        if mode == "ratio" or rooms:
            # Something else decides on the average, so no candidates must be refused for it.
            arguments["average_bits"] = max(arguments.get("widths") or Budget.widths)
        if mode == "alphaq":
            arguments.setdefault("noise", default_noise(propagates))
        return Budget(mode=mode, **arguments)

    def _preset(self) -> dict[str, Any]:
        """The fields that a preset sets. Raises ValueError for an unknown one, and for fields that it would set."""
        if self.preset is None:
            return {}
        if self.preset not in PRESETS:
            raise ValueError(f"`preset`: expected one of {', '.join(PRESETS)}, got {self.preset!r}")
        preset = PRESETS[self.preset]
        if given := [f"`{field}`" for field in preset if getattr(self, field) is not None]:
            raise ValueError(
                f"`preset={self.preset}`: expected to set {', '.join(f'`{field}`' for field in preset)}, got also "
                f"{', '.join(given)}: leave out one or the other"
            )
        return dict(preset)

    def room(self) -> Room | None:
        """What takes the place of ``bits``, if anything."""
        given = [field for field in ("bits", "target_size", "fit_memory") if getattr(self, field) is not None]
        if len(given) > 1:
            raise ValueError(f"{', '.join(f'`{field}`' for field in given)}: expected one of these, got {len(given)}")
        if self.reserve is not None and self.fit_memory is None:
            raise ValueError("`reserve`: expected together with `fit_memory`, got no memory: add it or leave this out")
        if self.target_size is not None:
            return target_size(size_of("target_size", self.target_size))
        if self.fit_memory is None:
            return None
        reserve = None if self.reserve is None else size_of("reserve", self.reserve)
        return fit_memory(size_of("fit_memory", self.fit_memory), reserve)


def default_noise(propagates: bool) -> str:
    """The error to minimise; propagates: whether the errors of layers' outputs can be had."""
    return "propagated" if propagates else "expert"


def size_of(field: str, value: int | str) -> int:
    """The bytes that a field of options stands for."""
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ValueError(f"`{field}`: {error}") from None


def widths_of(field: str, value: Sequence[int] | int | str) -> tuple[int, ...]:
    """The widths that a field of options stands for, ascending."""
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
    try:
        return tuple(sorted({int(part) for part in parts}))
    except (TypeError, ValueError):
        raise ValueError(f"`{field}`: expected widths such as 2,3,4, got {value!r}") from None


def _number(kind: type[Number], expected: str, field: str, value: Any) -> Number:
    try:
        if isinstance(value, bool) or (kind is int and kind(value) != float(value)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"`{field}`: expected {expected}, got {value!r}") from None


def _gamma(field: str, value: float | str) -> float | None:
    return None if value == "auto" else _number(float, "auto or a number", field, value)


def _shares(field: str, value: Sequence[float] | str) -> tuple[float, float]:
    try:
        top, bottom = map(float, value.split(",") if isinstance(value, str) else value)
    except (TypeError, ValueError):
        raise ValueError(f"`{field}`: expected two shares such as 0.25,0.25, got {value!r}") from None
    return top, bottom


def _word(field: str, value: str) -> str:
    return value


# How the value of each of the budget's fields is read.
_READ: dict[str, Callable[[str, Any], Any]] = {
    "bits": functools.partial(_number, float, "a number of bits"),
    "candidate_bits": widths_of,
    "gamma": _gamma,
    "noise": _word,
    "granularity": _word,
    "shares": _shares,
    "seed": functools.partial(_number, int, "a whole number"),
}
