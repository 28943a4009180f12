"""The directory that a command makes: complete or absent, and continued after an interruption.

While it is made it lies in a directory beside its place, with a journal of what is finished::

    OUT.partial/journal.jsonl   first what the result depends on, then what is finished
    OUT.partial/checkpoint      becomes OUT
    OUT.partial/kept            what enters the next layer, while the model runs

A name that has no room for ``.partial`` is shortened there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alphaq_vllm.format import FORMAT_VERSION
from alphaq_vllm.paths import name_limit
from offline import VERSION
from offline.journal import KEPT, Journal, sync
from offline.progress import format_bytes
from offline.source.checkpoint import CONFIG, Checkpoint
from offline.source.fingerprint import fingerprint
from offline.threads import compute_device

JOURNAL, DIRECTORY = "journal.jsonl", "checkpoint"
# Of a whole path in bytes: what Linux takes, less the longest names that are put below.
PATH_LIMIT = 4096 - 4 * 256


@dataclass(frozen=True)
class Output:
    """A directory to be filled, and the journal of what is finished."""

    directory: Path
    journal: Journal


def resolved(out: str | Path) -> Path:
    """The absolute path that a command is to make, without links; one that leads to itself is for ``check_output``."""
    # Unlike ``Path.resolve`` it raises nothing for such a link, whatever the version of Python.
    return Path(os.path.realpath(out))


def check_output(out: Path, source: Path, needed_bytes: int, resume: bool = False) -> None:
    """Raise unless ``out`` can become a new directory apart from ``source`` with room for ``needed_bytes``.

    Both paths are absolute and resolved. With ``resume``, what an interrupted run has left counts as room.
    """
    _check_length(out)
    if out == source or source in out.parents:
        raise ValueError(f"{out}: expected an output directory outside the source {source}: choose another one")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: expected a new or empty output directory, got a file: choose another name")
    if out.is_symlink():
        raise ValueError(f"{out}: expected a new or empty output directory, got a link to itself: choose another name")
    above = next(parent for parent in out.parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{above}: expected a directory to put {out.name} in, got a file: choose another one")
    partial = _partial(out)
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise ValueError(f"{partial}: expected a directory or nothing, got a file or a link: remove it")
    if _is_left_over(partial, out):
        shutil.rmtree(partial)
    if not (resume and partial.is_dir()):
        _check_empty(out, resume)
    if out.is_mount():
        raise ValueError(f"{out}: a mount point cannot be replaced: choose a new directory inside it")
    free = shutil.disk_usage(above).free
    if resume:
        free += sum(512 * path.stat().st_blocks for path in partial.rglob("*") if path.is_file())
    if free < needed_bytes:
        raise ValueError(
            f"{above}: expected {format_bytes(needed_bytes)} of free disk space, got {format_bytes(free)}: "
            "free some, lower `bits` or choose another output directory"
        )


def conditions(source: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that the bytes of a result depend on, for ``open_output``.

    settings: every argument that they depend on, as JSON.
    Rounding may differ between versions of torch and between kinds of processors.
    """
    files = {file.name: file for file in (source.path / CONFIG, *source.files)} | dict(source.sidecars)
    status = [(name, file.stat().st_size, file.stat().st_mtime_ns) for name, file in sorted(files.items())]
    return {
        "source": f"{fingerprint(source)} {hashlib.sha256(repr(status).encode()).hexdigest()}",
        "settings": json.loads(json.dumps(settings)),
        "alphaq-vllm": f"{VERSION}, format {FORMAT_VERSION}",
        "torch": torch.__version__,
        "processor": _processor(),
    }


@contextmanager
def open_output(out: Path, depends_on: Mapping[str, Any], resume: bool = False) -> Iterator[Output]:
    """A directory that becomes ``out`` when the block succeeds.

    depends_on: see ``conditions``; resume: take up what an interrupted run has left, if there is any.
    When the block fails, what is done so far is kept for that, except that a ValueError (the input is wrong) in a run
    that was not resumed leaves nothing.
    Raises ValueError if another process is writing it, if an interrupted run has left something and ``resume`` is
    False, or if that run depended on something else.
    """
    partial = _partial(out)
    try:
        partial.mkdir(parents=True)
        resumed = False
    except FileExistsError:
        resumed = True
        if not resume:
            raise ValueError(
                f"{partial}: exists already, so another run is writing it or was interrupted: "
                "add `resume` to continue that one, or remove this directory to start again"
            ) from None
    if resumed and not (partial / JOURNAL).exists() and any(partial.iterdir()):
        raise ValueError(f"{partial}: expected what an interrupted run left, got no {JOURNAL}: remove this directory")
    journal = Journal(partial / JOURNAL)
    try:
        directory = _begin(partial, out, journal, depends_on)
        yield Output(directory, journal)
        journal.record({"complete": directory.stat().st_ino})
        journal.commit()
        sync(directory)
        directory.rename(out)
        sync(out.parent)
        # First, so that a run killed from here on is known to be complete. The next one removes what that leaves.
        journal.path.unlink()
        shutil.rmtree(partial, ignore_errors=True)
    except ValueError:
        if not resumed:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except (OSError, KeyboardInterrupt) as error:
        raise _resumable(error, partial) from error
    finally:
        # A disk that is full must not hide the error that said so.
        with suppress(OSError):
            journal.commit()
        journal.close()


def _check_length(out: Path) -> None:
    """Raise ValueError if the file system, or Linux, does not take the path."""
    limit, longest = name_limit(out), max(map(_num_bytes, out.parts))
    if longest > limit:
        raise ValueError(f"{out}: expected names of at most {limit} bytes, got one of {longest}: choose a shorter one")
    if (length := _num_bytes(str(out))) > PATH_LIMIT:
        raise ValueError(f"{out}: expected a path of at most {PATH_LIMIT} bytes, got {length}: choose a shorter one")


def _num_bytes(name: str) -> int:
    return len(os.fsencode(name))


def _partial(out: Path) -> Path:
    name, ending, limit = out.name, ".partial", name_limit(out)
    if _num_bytes(name + ending) > limit:
        encoded = os.fsencode(name)
        ending = f"-{hashlib.sha256(encoded).hexdigest()[:16]}{ending}"
        # A letter that is cut in two is left out.
        name = encoded[: limit - len(ending)].decode(errors="ignore")
    return out.with_name(name + ending)


def _check_empty(out: Path, resume: bool = False) -> None:
    if out.is_dir() and any(out.iterdir()):
        nothing = f" (there is nothing to resume: an interrupted run leaves {_partial(out)})" if resume else ""
        raise ValueError(
            f"{out}: expected a new or empty output directory, got one with files{nothing}: choose another one"
        )


def _is_left_over(partial: Path, out: Path) -> bool:
    """Whether a run was killed after ``out`` was complete, while it removed what was no longer needed."""
    complete = out.is_dir() and any(out.iterdir())
    return complete and partial.is_dir() and {path.name for path in partial.iterdir()} <= {KEPT}


def _begin(partial: Path, out: Path, journal: Journal, depends_on: Mapping[str, Any]) -> Path:
    """The directory to be filled, after checking that the journal is that of the same work or new."""
    directory = partial / DIRECTORY
    if not journal.entries:
        if directory.exists():
            raise ValueError(f"{partial}: expected a whole {JOURNAL}, got a damaged one: remove this directory")
        journal.record(depends_on)
        journal.commit()
    else:
        before = journal.entries[0]
        if before != depends_on:
            raise ValueError(
                f"{partial}: cannot be resumed, for the run that left it had {_difference(before, depends_on)}: "
                "run the same command as then, or remove this directory to start again"
            )
        # Killed between the renaming and the removal of the journal: once more from just before that.
        if not directory.exists() and out.exists() and journal.entries[-1] == {"complete": out.stat().st_ino}:
            out.rename(directory)
    _check_empty(out)
    directory.mkdir(exist_ok=True)
    sync(partial)
    return directory


def _difference(before: Any, now: Any) -> str:
    """The first value that differs."""
    path = []
    while isinstance(before, Mapping) and isinstance(now, Mapping):
        path.append(next(key for key in {**before, **now} if before.get(key) != now.get(key)))
        before, now = before.get(path[-1]), now.get(path[-1])
    if path == ["source"]:
        return "a source with other files or older ones"
    return f"{'.'.join(path)} = {before!r:.80}, not {now!r:.80}"


def _resumable(error: OSError | KeyboardInterrupt, partial: Path) -> BaseException:
    """The same error with the way out."""
    way_out = f"{partial} keeps what is done: run the same command with `resume` to continue"
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(f"interrupted: {way_out}")
    if error.errno is None:
        return type(error)(f"{error}: {way_out}")
    return OSError(error.errno, f"{error.strerror}: {way_out}", error.filename)


def _processor() -> str:
    if compute_device().type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"
