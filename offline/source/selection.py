"""Which matrices the user leaves out of the conversion, or gives a width by hand."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from offline.messages import some
from offline.source.families import ExpertMatrix, Experts


@dataclass(frozen=True)
class Selection:
    """Patterns (as of file names) of matrix names.

    exclude: of the modules of experts that stay as they are; overrides: with the bits of what they match.
    """

    exclude: tuple[str, ...] = ()
    overrides: tuple[tuple[str, int], ...] = ()

    def quantized(self, experts: Experts) -> Experts:
        """The experts that are not excluded.

        Raises ValueError for a pattern that matches nothing, for part of a module, and if nothing is left.
        """
        excluded = {matrix for pattern in self.exclude for matrix in _matching("exclude", pattern, experts.matrices)}
        kept = tuple(matrix for matrix in experts.matrices if matrix not in excluded)
        cut = {matrix.module for matrix in excluded} & {matrix.module for matrix in kept}
        if cut:
            remaining = [matrix.name for matrix in kept if matrix.module in cut]
            raise ValueError(
                f"`exclude`: expected whole modules of experts, because one that is quantized only in part cannot be "
                f"served, got patterns that leave {some(remaining)}: exclude '{min(cut)}.*', or give single experts 8 "
                "bits with `override`"
            )
        if not kept:
            raise ValueError(f"`exclude`: expected to leave some experts, got all {len(experts.matrices)} excluded")
        return replace(experts, matrices=kept)

    def fixed(self, matrices: Sequence[ExpertMatrix]) -> dict[str, int]:
        """Bits by name of the matrices that an override names.

        Raises ValueError for a pattern that matches nothing (any more, after exclusions) and for two widths for one
        matrix.
        """
        bits: dict[str, int] = {}
        for pattern, num_bits in self.overrides:
            for matrix in _matching("override", pattern, matrices):
                if bits.setdefault(matrix.name, num_bits) != num_bits:
                    raise ValueError(
                        f"`override`: expected one width for {matrix.name}, got {bits[matrix.name]} and {num_bits}: "
                        "make the patterns narrower"
                    )
        return bits


def of_modules(experts: Experts, modules: Collection[str]) -> Experts:
    """The experts of some modules. Raises ValueError for a module that the model does not have."""
    if unknown := sorted(set(modules) - set(experts.modules)):
        raise ValueError(
            f"expected modules of experts that the source has, got also {some(unknown)}: is it the source?"
        )
    return replace(experts, matrices=tuple(matrix for matrix in experts.matrices if matrix.module in modules))


def _matching(field: str, pattern: str, matrices: Sequence[ExpertMatrix]) -> list[ExpertMatrix]:
    matching = [matrix for matrix in matrices if fnmatchcase(matrix.name, pattern)]
    if not matching:
        raise ValueError(
            f"`{field}`: expected a pattern that matches expert matrices, such as '{matrices[0].module}.*', "
            f"got {pattern!r}, which matches none"
        )
    return matching
