"""SHA-256 sums of a checkpoint's files, as ``sha256sum --check`` reads them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from alphaq_vllm.cores import available_cores

SUMS = "SHA256SUMS"
# What people edit in a finished checkpoint: no weight and no vocabulary is in it. Chat templates are in several.
EDITABLE = (
    "*.md", "*.jinja", "chat_template.json", "tokenizer_config.json", "generation_config.json", "LICENSE*", "NOTICE*",
    "alphaq_stats.csv",
)  # fmt: skip
# Files that no checkpoint has without a sum.
ESSENTIAL = ("config.json", "model.safetensors.index.json", "*.safetensors")

# No name leads out of the directory.
_LINE = re.compile(r"([0-9a-f]{64})  ((?:(?!\.{1,2}/)[^/\n\0]+/)*(?!\.{1,2}\n)[^/\n\0]+)\n")


def sums_size(names: Iterable[str]) -> int:
    """Bytes of the file of sums for files of these names."""
    return sum(64 + 2 + len(name.encode()) + 1 for name in names)


def render_sums(directory: Path) -> str:
    """The file of sums for all files in a directory and its folders, by name."""
    files = (file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())
    names = sorted(name for name in files if name != SUMS)
    return format_sums({name: sha256(directory / name) for name in names})


def format_sums(sums: Mapping[str, str]) -> str:
    """The file of these sums by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


def sha256(path: Path) -> str:
    """The SHA-256 sum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        # hashlib.file_digest is newer than the oldest Python that is supported.
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class Comparison(NamedTuple):
    """Files that have a sum: all of them, those that are not there, and those with other contents.

    found: the sums of those that are there, as they are now.
    """

    names: Sequence[str]
    missing: Sequence[str]
    different: Sequence[str]
    found: Mapping[str, str]

    def without(self, patterns: Sequence[str]) -> Comparison:
        """The same, but for files whose names match one of some patterns."""
        names, missing, different = (
            [name for name in some if not any(fnmatchcase(name, pattern) for pattern in patterns)] for some in self[:3]
        )
        return Comparison(names, missing, different, {name: self.found[name] for name in names if name in self.found})


def compare_sums(directory: Path, sum_of: Callable[[Path], str] = sha256) -> Comparison:
    """Compare all files with the sums that the conversion left. Other files may have been added.

    sum_of: how to come by the sum of a file; called in several threads.
    Raises FileNotFoundError or ValueError for a missing or malformed file of sums, and for files of the checkpoint that
    have no sum.
    """
    path = directory / SUMS
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected the checksums that convert writes, got none: convert the source again"
        )
    sums = _parse(path)
    essential = {file.name for pattern in ESSENTIAL for file in directory.glob(pattern)}
    if without := sorted(essential - sums.keys()):
        raise ValueError(f"{path}: expected a sum for every file of the checkpoint, got none for {_few(without)}")
    present = [name for name in sums if (directory / name).is_file()]
    # Python lets other threads run while it computes a sum.
    with ThreadPoolExecutor(available_cores()) as pool:
        found = dict(zip(present, pool.map(sum_of, [directory / name for name in present]), strict=True))
    different = [name for name, digest in found.items() if digest != sums[name]]
    return Comparison(list(sums), [name for name in sums if name not in found], different, found)


def check_sums(directory: Path) -> int:
    """Compare all files with the sums that the conversion left; return how many.

    Raises FileNotFoundError or ValueError as ``compare_sums`` and ``refuse`` do.
    """
    comparison = compare_sums(directory)
    refuse(directory, comparison)
    return len(comparison.names)


def refuse(directory: Path, comparison: Comparison) -> None:
    """Raise FileNotFoundError if a file is missing, and ValueError if one has other contents."""
    if comparison.missing:
        raise FileNotFoundError(
            f"{directory}: expected all files of {SUMS}, got no {_few(comparison.missing)}: copy it again"
        )
    if comparison.different:
        raise ValueError(
            f"{directory}: expected the contents that {SUMS} states, got others in {_few(comparison.different)}: "
            "copy it again"
        )


def _parse(path: Path) -> dict[str, str]:
    text = path.read_bytes().decode(errors="replace")
    entries = _LINE.findall(text)
    if "".join(f"{digest}  {name}\n" for digest, name in entries) != text or not entries:
        raise ValueError(
            f"{path}: expected lines of a SHA-256 sum and a file name, got others: convert the source again"
        )
    return {name: digest for digest, name in entries}


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
