"""Which names and paths a file system and vLLM take."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from glob import glob
from pathlib import Path


def name_limit(path: Path) -> int:
    """How many bytes a name may have where ``path``, which is absolute, would be made."""
    # Unlike that of ``Path``, this raises nothing for names that are too long.
    return os.pathconf(next(parent for parent in path.parents if os.path.isdir(parent)), "PC_NAME_MAX")  # noqa: PTH112


def check_path(directory: Path) -> None:
    """Raise ValueError for a directory, there or not, whose weights vLLM would not find, or not alone.

    vLLM looks for them by ``glob``: to it ``out[1]`` means ``out1``.
    """
    found = [path for path in glob(str(directory)) if Path(path) != directory]  # noqa: PTH207
    if found or not all(fnmatchcase(part, part) for part in directory.parts):
        raise ValueError(
            f"{directory}: expected a path that is not a pattern, as which vLLM reads it, got one that means "
            f"{found[0] if found else 'another'}: choose one without * ? [ ]"
        )
