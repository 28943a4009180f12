"""The cache of the Hugging Face Hub: which repository a directory in it is a snapshot of, and of what it lacks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Snapshot:
    """A repository, ``owner/model``, at a commit."""

    name: str
    commit: str


def snapshot_of(directory: Path) -> Snapshot | None:
    """What a directory is a snapshot of, if it is one of the cache: ``models--OWNER--MODEL/snapshots/COMMIT``."""
    path = directory.resolve()
    if path.parent.name != "snapshots":
        return None
    kind, _, parts = path.parents[1].name.partition("--")
    name = parts.replace("--", "/")
    # The oldest models have no owner.
    whole = name if "/" in name else f"-/{name}"
    return Snapshot(name, path.name) if kind == "models" and NAME.fullmatch(whole) else None


def absent_files(directory: Path) -> list[str]:
    """The files that a snapshot lacks of its repository, as far as the cache remembers them; nothing is asked of the
    Hub.
    """
    snapshot = snapshot_of(directory)
    if snapshot is None:
        return []
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:
        # Older clients remember nothing.
        return []
    try:
        files = get_cached_repo_tree(snapshot.name, revision=snapshot.commit, cache_dir=directory.resolve().parents[2])
    except CachedRepoTreeNotFoundError:
        return []
    return [file.path for file in files if not (directory / file.path).is_file()]
