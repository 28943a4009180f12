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

from alphaq_vllm.format import SUPPORTED_BITS
from offline.allocation.bit_map import check_widths, read_bit_map
from offline.allocation.widths import Budget
from offline.model.text import Calibration
from offline.operations.width_options import BUDGET_FIELDS, WidthOptions, default_noise, size_of, widths_of
from offline.quantizers.grids import GRIDS
from offline.quantizers.quantize import QUANTIZERS
from offline.source.linear import UNQUANTIZED, check_linear_bits
from offline.source.selection import Selection
from offline.writing.writer import DEFAULT_SHARD_BYTES

Fields = ParamSpec("Fields")
Options = TypeVar("Options")
First = TypeVar("First")
Second = TypeVar("Second")
Result = TypeVar("Result")

MANUAL = "manual"
EFFORTS, EFFORT_TIMES = (0, 1, 2), 4


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(WidthOptions):
    """How a checkpoint is converted; None leaves a field to its default.

    Attributes:
        bit_map: Bits by matrix name, or a JSON file of them, in place of a choice.
        stats: A file that ``measure`` wrote of the model, to choose by.
        override: Widths by pattern of matrix names, as of file names.
        exclude: Patterns of modules of experts that stay as they are.
        effort: 0 takes the defaults of models that the converter cannot run, for any model: the fastest, and worse; 1;
            2 is 1 with ``EFFORT_TIMES`` as many tokens for ``gptq`` where experts are large.
        quantizer: ``gptq`` (the default where the converter can run the model), ``mse`` (elsewhere), ``rtn`` or
            ``hqq``.
        calibration: Files of text for ``gptq``; by default the model writes it itself.
        calibration_tokens: To use at most; each takes 12 bytes of memory times the hidden size.
        calibration_length: Tokens that the model sees together; by default 512.
        group_size: Input columns of experts that share a grid: 32, 64 or 128.
        mtp_bits: Of the experts of layers for multi-token prediction, where vLLM serves these quantized; 16 leaves them
            alone.
        linear_bits: Of linear layers outside the experts: 16 leaves them alone, 8 or 4.
        head_bits: Of the matrix that predicts tokens: 16 leaves it alone, 8 or 4.
        revision: Of a model on the Hub: a branch, a tag or a commit; by default its main branch.
        family: A type of model in the table of families whose experts have the same names; by default found by the
            model's own type, or else by the names.
        tp_size: Ranks of tensor parallelism that the result must split among.
        max_shard_size: Of the data in one file.
        dry_run: Decide everything, estimate the time, and write nothing.
        resume: Take up what an interrupted run has left.
        workers: Processes to use, which changes no byte; by default as many as help, and as have memory.
        memory: That the conversion may take, about: fewer workers, and if one takes too much, fewer tokens for gptq.

    Raises:
        ValueError: For a value that a field does not take, and for fields that contradict each other.
        OSError: If the bit map cannot be read.
    """

    bit_map: Mapping[str, int] | str | Path | None = None
    stats: str | Path | None = None
    override: Mapping[str, int] | Sequence[str] = ()
    exclude: Sequence[str] | str = ()
    effort: int = 1
    quantizer: str | None = None
    calibration: Sequence[str | Path] | str | Path = ()
    calibration_tokens: int | None = None
    calibration_length: int | None = None
    group_size: int = 64
    mtp_bits: int = 4
    linear_bits: int = UNQUANTIZED
    head_bits: int = UNQUANTIZED
    revision: str | None = None
    family: str | None = None
    tp_size: int = 1
    max_shard_size: int | str = DEFAULT_SHARD_BYTES
    dry_run: bool = False
    resume: bool = False
    workers: int | None = None
    memory: int | str | None = None

    def __post_init__(self) -> None:
        self.widths()
        self.memory_bytes()
        self.room()
        self.selection()
        self.text()
        self.shard_bytes()
        if self.effort not in EFFORTS:
            raise ValueError(f"`effort`: expected one of {', '.join(map(str, EFFORTS))}, got {self.effort!r}")
        if self.quantizer not in (None, *QUANTIZERS):
            raise ValueError(f"`quantizer`: expected one of {', '.join(QUANTIZERS)}, got {self.quantizer!r}")
        if self.mtp_bits not in (*SUPPORTED_BITS, UNQUANTIZED):
            raise ValueError(f"`mtp_bits`: expected one of 1 to 8 or 16, got {self.mtp_bits!r}")
        for field in ("linear_bits", "head_bits"):
            check_linear_bits(field, getattr(self, field))

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
        fields = ("preset", *BUDGET_FIELDS, "target_size", "fit_memory")
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

    @property
    def text_times(self) -> int:
        """Of the default's tokens to calibrate on."""
        return EFFORT_TIMES if self.effort == max(EFFORTS) else 1

    def text(self, quantizer: str = "gptq") -> Calibration | None:
        """What to calibrate on, if the user says anything of it; quantizer: unless the user names one."""
        quantizer = self.quantizer or quantizer
        files = [self.calibration] if isinstance(self.calibration, (str, Path)) else list(self.calibration)
        length = Calibration.length if self.calibration_length is None else self.calibration_length
        if not files and self.calibration_tokens is None and self.calibration_length is None:
            return None
        if quantizer != "gptq":
            raise ValueError(f"`calibration`: expected `quantizer=gptq`, got {quantizer}, which works without text")
        return Calibration(tuple(map(Path, files)), self.calibration_tokens, length, self.text_times)

    def memory_bytes(self) -> int | None:
        """Bytes that a conversion may take, if the user says it."""
        return None if self.memory is None else size_of("memory", self.memory)

    def shard_bytes(self) -> int:
        """Bytes of data in one file, at most."""
        return size_of("max_shard_size", self.max_shard_size)


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What is measured of every expert matrix; None leaves a field to its default.

    Attributes:
        candidate_bits: The widths to measure the error of; by default 2, 3 and 4.
        noise: As of ``WidthOptions``: ``analytic`` needs no errors, ``propagated`` also how they propagate.
        quantizer: Whose error: ``mse``, ``rtn`` or ``hqq``.
        group_size: Input columns of experts that share a grid: 32, 64 or 128.
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
    group_size: int = 64
    revision: str | None = None
    family: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        self.budget()
        if self.quantizer not in GRIDS:
            raise ValueError(f"`quantizer`: expected one of {', '.join(GRIDS)}, got {self.quantizer!r}")

    def budget(self, propagates: bool = False) -> Budget:
        """A budget that needs what is to be measured; propagates: whether that can be measured, unless told."""
        widths = Budget.widths if self.candidate_bits is None else widths_of("candidate_bits", self.candidate_bits)
        average = float(widths[0]) if widths else 0.0
        return Budget(average_bits=average, widths=widths, noise=self.noise or default_noise(propagates))


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


def _width(pattern: str, bits: int | str) -> int:
    if not pattern or str(bits) not in map(str, SUPPORTED_BITS):
        raise ValueError(
            f"`override`: expected PATTERN=BITS with bits out of {SUPPORTED_BITS}, got {f'{pattern}={bits}'!r}"
        )
    return int(bits)
