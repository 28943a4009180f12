"""What a user may decide of each operation: one frozen object, built alike by the command line, by ``--hf-overrides``
in vLLM, and by the functions in Python, whose keywords are its fields.

A number may be given as text, a list as text with commas, a size as ``12GiB``. Messages have fields in backquotes; the
command line replaces them by its own spelling.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from alphaq_vllm.format import LINEAR_BITS, SUPPORTED_BITS
from offline.allocation.bit_map import check_widths, read_bit_map
from offline.allocation.sizes import Room, fit_memory, target_size
from offline.allocation.widths import MODES, Budget
from offline.model.text import Calibration
from offline.progress import parse_bytes
from offline.quantizers.grids import GRIDS
from offline.quantizers.quantize import QUANTIZERS
from offline.source.selection import Selection
from offline.writing.writer import DEFAULT_SHARD_BYTES

Number = TypeVar("Number", int, float)
Fields = ParamSpec("Fields")
Options = TypeVar("Options")
First = TypeVar("First")
Second = TypeVar("Second")
Result = TypeVar("Result")

MANUAL = "manual"
# The fields that are the budget's, with its names for them, and those that each mode makes use of.
_BUDGET = {
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
        gamma: Exponent of importance, or ``auto`` (the default), by the spread of alpha: a quarter of that beside
            ``noise=propagated``, and 0 beside ``noise=expert``.
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
        given = self._preset() | {field: value for field in _BUDGET if (value := getattr(self, field)) is not None}
        mode = given.pop("mode", "alphaq") if self.mode is None else self.mode
        if mode not in MODES:
            raise ValueError(f"`mode`: expected one of {', '.join(MODES)}, got {mode!r}")
        rooms = [field for field in ("target_size", "fit_memory") if getattr(self, field) is not None]
        unused = [field for field in given if field not in _USED[mode]] + ([] if "bits" in _USED[mode] else rooms)
        if unused:
            names = ", ".join(f"`{field}`" for field in unused)
            raise ValueError(f"`mode={mode}`: expected only options that it uses, got also {names}")
        arguments: dict[str, Any] = {_BUDGET[field]: _READ[field](field, value) for field, value in given.items()}
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
            return target_size(_size("target_size", self.target_size))
        if self.fit_memory is None:
            return None
        reserve = None if self.reserve is None else _size("reserve", self.reserve)
        return fit_memory(_size("fit_memory", self.fit_memory), reserve)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(WidthOptions):
    """How a checkpoint is converted; None leaves a field to its default.

    Attributes:
        bit_map: Bits by matrix name, or a JSON file of them, in place of a choice.
        stats: A file that ``measure`` wrote of the model, to choose by.
        override: Widths by pattern of matrix names, as of file names.
        exclude: Patterns of modules of experts that stay as they are.
        quantizer: ``gptq`` (the default where the converter can run the model), ``mse`` (elsewhere), ``rtn`` or
            ``hqq``.
        calibration: Files of text for ``gptq``; by default the model writes it itself.
        calibration_tokens: To use at most; each takes 12 bytes of memory times the hidden size.
        calibration_length: Tokens that the model sees together; by default 512.
        group_size: Input columns that share a scale and a zero point: 32, 64 or 128.
        linear_bits: Of linear layers outside the experts: 16 leaves them alone, 8 or 4.
        revision: Of a model on the Hub: a branch, a tag or a commit; by default its main branch.
        family: A type of model in the table of families whose experts have the same names; by default found by the
            model's own type, or else by the names.
        tp_size: Ranks of tensor parallelism that the result must split among.
        max_shard_size: Of the data in one file.
        dry_run: Decide everything, estimate the time, and write nothing.
        resume: Take up what an interrupted run has left.
        workers: Processes to use, which changes no byte; by default as many as help.

    Raises:
        ValueError: For a value that a field does not take, and for fields that contradict each other.
        OSError: If the bit map cannot be read.
    """

    bit_map: Mapping[str, int] | str | Path | None = None
    stats: str | Path | None = None
    override: Mapping[str, int] | Sequence[str] = ()
    exclude: Sequence[str] | str = ()
    quantizer: str | None = None
    calibration: Sequence[str | Path] | str | Path = ()
    calibration_tokens: int | None = None
    calibration_length: int | None = None
    group_size: int = 128
    linear_bits: int = 16
    revision: str | None = None
    family: str | None = None
    tp_size: int = 1
    max_shard_size: int | str = DEFAULT_SHARD_BYTES
    dry_run: bool = False
    resume: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        self.widths()
        self.room()
        self.selection()
        self.text()
        self.shard_bytes()
        if self.quantizer not in (None, *QUANTIZERS):
            raise ValueError(f"`quantizer`: expected one of {', '.join(QUANTIZERS)}, got {self.quantizer!r}")
        if self.linear_bits not in (16, *LINEAR_BITS):
            raise ValueError(f"`linear_bits`: expected one of 16, 8, 4, got {self.linear_bits!r}")

    def widths(self, propagates: bool = False) -> Budget | dict[str, int]:
        """The bit map, or else the budget; propagates: see ``budget``."""
        if self.bit_map is None:
            if self.mode == MANUAL:
                raise ValueError(f"`mode={MANUAL}`: expected a bit map, got none: see `bit_map`")
            return self.budget(propagates)
        if self.mode not in (None, MANUAL):
            raise ValueError(
                f"`mode={self.mode}`: expected no bit map, which only `mode={MANUAL}` takes: leave out one"
            )
        fields = ("preset", *_BUDGET, "target_size", "fit_memory")
        if given := [f"`{field}`" for field in fields if getattr(self, field) is not None]:
            raise ValueError(
                f"`bit_map`: expected to be the only choice of widths, got also {', '.join(given)}: leave out one"
            )
        if isinstance(self.bit_map, Mapping):
            check_widths("`bit_map`", self.bit_map)
            return dict(self.bit_map)
        return read_bit_map(Path(self.bit_map))

    def selection(self) -> Selection:
        """What is left alone, or has a width given by hand."""
        exclude = (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude)
        if isinstance(self.override, Mapping):
            return Selection(
                exclude, tuple((pattern, _width(pattern, bits)) for pattern, bits in self.override.items())
            )
        overrides = (self.override,) if isinstance(self.override, str) else self.override
        parts = (str(override).rpartition("=") for override in overrides)
        return Selection(exclude, tuple((pattern, _width(pattern, bits)) for pattern, _, bits in parts))

    def text(self, quantizer: str = "gptq") -> Calibration | None:
        """What to calibrate on, if the user says anything of it; quantizer: unless the user names one."""
        quantizer = self.quantizer or quantizer
        files = [self.calibration] if isinstance(self.calibration, (str, Path)) else list(self.calibration)
        length = Calibration.length if self.calibration_length is None else self.calibration_length
        if not files and self.calibration_tokens is None and self.calibration_length is None:
            return None
        if quantizer != "gptq":
            raise ValueError(f"`calibration`: expected `quantizer=gptq`, got {quantizer}, which works without text")
        return Calibration(tuple(map(Path, files)), self.calibration_tokens, length)

    def shard_bytes(self) -> int:
        """Bytes of data in one file, at most."""
        return _size("max_shard_size", self.max_shard_size)


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What is measured of every expert matrix; None leaves a field to its default.

    Attributes:
        candidate_bits: The widths to measure the error of; by default 2, 3 and 4.
        noise: As of ``WidthOptions``: ``analytic`` needs no errors, ``propagated`` also how they propagate.
        quantizer: Whose error: ``mse``, ``rtn`` or ``hqq``.
        group_size: Input columns that share a scale and a zero point: 32, 64 or 128.
        revision: Of a model on the Hub: a branch, a tag or a commit; by default its main branch.
        family: A type of model in the table of families whose experts have the same names; by default found by the
            model's own type, or else by the names.
        workers: Processes to use, which changes no figure; by default as many as help.

    Raises:
        ValueError: For a value that a field does not take.
    """

    candidate_bits: Sequence[int] | int | str | None = None
    noise: str | None = None
    quantizer: str = "mse"
    group_size: int = 128
    revision: str | None = None
    family: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        self.budget()
        if self.quantizer not in GRIDS:
            raise ValueError(f"`quantizer`: expected one of {', '.join(GRIDS)}, got {self.quantizer!r}")

    def budget(self, propagates: bool = False) -> Budget:
        """A budget that needs what is to be measured; propagates: whether that can be measured, unless told."""
        widths = Budget.widths if self.candidate_bits is None else _widths("candidate_bits", self.candidate_bits)
        average = float(widths[0]) if widths else 0.0
        return Budget(average_bits=average, widths=widths, noise=self.noise or default_noise(propagates))


def default_noise(propagates: bool) -> str:
    """The error to minimise; propagates: whether the errors of layers' outputs can be had."""
    return "propagated" if propagates else "expert"


def with_options(
    options: Callable[Fields, Options],
) -> Callable[[Callable[[First, Second, Options], Result]], Callable[Concatenate[First, Second, Fields], Result]]:
    """Let a function take the fields of its options as keywords, after what it reads and what it writes.

    Args:
        options: The class of options. Its fields become keywords of the function, with the same defaults.
    """

    def decorate(
        function: Callable[[First, Second, Options], Result],
    ) -> Callable[Concatenate[First, Second, Fields], Result]:
        @functools.wraps(function)
        def call(first: First, second: Second, *args: Fields.args, **keywords: Fields.kwargs) -> Result:
            return function(first, second, options(*args, **keywords))

        own, taken = inspect.signature(function), inspect.signature(options)
        call.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[*list(own.parameters.values())[:2], *taken.parameters.values()]
        )
        return call

    return decorate


def options_from(settings: Mapping[str, Any], allowed: Sequence[str]) -> ConvertOptions:
    """The options that a JSON object stands for.

    Args:
        settings: Values by field.
        allowed: The fields that make sense where the object was given.

    Raises:
        ValueError: For another field, and as ``ConvertOptions`` does.
    """
    if unknown := sorted(set(settings) - set(allowed)):
        known = {field.name for field in fields(ConvertOptions)}
        hint = ", which only a conversion takes" if known.issuperset(unknown) else ""
        raise ValueError(
            f"expected settings out of {', '.join(allowed)}, got {', '.join(unknown)}{hint}: leave them out, or use "
            "python -m offline.convert"
        )
    return ConvertOptions(**settings)


def _size(field: str, value: int | str) -> int:
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ValueError(f"`{field}`: {error}") from None


def _width(pattern: str, bits: int | str) -> int:
    if not pattern or str(bits) not in map(str, SUPPORTED_BITS):
        raise ValueError(
            f"`override`: expected PATTERN=BITS with bits out of {SUPPORTED_BITS}, got {f'{pattern}={bits}'!r}"
        )
    return int(bits)


def _widths(field: str, value: Sequence[int] | int | str) -> tuple[int, ...]:
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
    "candidate_bits": _widths,
    "gamma": _gamma,
    "noise": _word,
    "granularity": _word,
    "shares": _shares,
    "seed": functools.partial(_number, int, "a whole number"),
}
