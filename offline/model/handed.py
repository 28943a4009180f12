"""What decoder layers hand on besides hidden states, such as the tokens that an indexer chooses for several layers.

What a layer hands on is a dictionary, by the place of each value in what the layer returns, where hidden states are in
place 0. There is one for each window, because layers see windows one at a time.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only

# How a decoder calls layers that return more than hidden states.
_UNPACKED = re.compile(r"^\s*(\w+\s*,[^=\n]*)=\s*\w*layer\(", re.MULTILINE)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Handed = Mapping[int, Any]


@dataclass(frozen=True)
class Place:
    """Stands in a layer's arguments for what the layer before it, number ``layer``, returns in a place."""

    layer: int
    place: int


def num_returned(decoder: Any) -> int:
    """How many values a decoder takes of what a layer returns."""
    unpacked = _UNPACKED.search(inspect.getsource(inspect.unwrap(type(decoder).forward)))
    return len([name for name in unpacked[1].split(",") if name.strip()]) if unpacked else 1


def places(arguments: Arguments) -> list[Place]:
    """What a layer with these arguments takes of what the layer before it returns."""
    return sorted({part for part in tree_iter(arguments) if isinstance(part, Place)}, key=lambda part: part.place)


def filled(arguments: Arguments, handed: Handed) -> Arguments:
    """The arguments with what a layer was handed."""
    complete: Arguments = tree_map_only(Place, lambda part: handed[part.place], arguments)
    return complete


def same(one: Handed, other: Handed) -> bool:
    """Whether two runs of a layer have handed on the same."""

    def alike(value: Any, place: int) -> bool:
        if isinstance(value, Tensor):
            return torch.equal(value, other[place])
        return bool(value == other[place])

    return all(alike(value, place) for place, value in one.items())


def nbytes(handed: Handed) -> int:
    """Bytes that are handed on for a window."""
    return sum(value.nbytes for value in handed.values() if isinstance(value, Tensor))


def keep(handed: Mapping[int, Handed], path: Path) -> None:
    """Write what a layer was handed, by window, for ``restored``."""
    tensors = {
        f"{window}.{place}": value.cpu().contiguous()
        for window, values in handed.items()
        for place, value in values.items()
        if value is not None
    }
    path.write_bytes(save(tensors))


def restored(path: Path, windows: int, wanted: list[Place], device: torch.device) -> dict[int, Handed]:
    """What ``keep`` has written, for so many windows."""
    tensors = load_file(path)
    return {
        window: {
            part.place: tensors[name].to(device) if (name := f"{window}.{part.place}") in tensors else None
            for part in wanted
        }
        for window in range(windows)
    }
