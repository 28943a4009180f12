"""Statistics kept between runs, for programs that choose widths whenever they start."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock

import offline
from alphaq_vllm.cache import cache_directory
from offline import VERSION
from offline.allocation.widths import Budget
from offline.messages import printed
from offline.operations.plan import Job
from offline.sensitivity.stats import Statistics, read_statistics
from offline.source.fingerprint import fingerprint


def cached_statistics(job: Job, budget: Budget) -> tuple[Statistics, str]:
    """The statistics of all of a source's experts that a budget needs, and a sentence on where they come from.

    They are measured in a process of its own, which returns the memory that it took, unless a
    file is there of the same source, settings and version. A file is whole or absent, and programs that start together
    measure once.
    Raises ValueError if measuring fails.
    """
    sampled, widths, directory = fingerprint(job.source), budget.measured_widths, cache_directory()
    noise = budget.noise if widths else "analytic"
    key = json.dumps([sampled, job.group_size, noise, widths, job.quantizer, VERSION])
    # The name is for people, and a part of a long one is enough.
    name = printed(job.source.path.resolve().name)[:48]
    path = directory / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.csv"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{directory}: expected a directory for statistics, got {error}: set ALPHAQ_CACHE to one"
        ) from error
    with FileLock(path.with_suffix(".lock")):
        again = ""
        if path.exists():
            try:
                statistics = read_statistics(path)
                statistics.check(sampled, job.group_size, widths, job.quantizer)
                return statistics, f"statistics reused from {path}"
            except ValueError as error:
                again = f" (not reused: {error})"
        start = time.monotonic()
        with TemporaryDirectory(dir=directory) as folder:
            measured = Path(folder, path.name)
            _measure(job, noise, widths, measured)
            measured.replace(path)
        seconds = time.monotonic() - start
        return read_statistics(path), f"statistics measured in {seconds:.1f} s and saved in {path}{again}"


def _measure(job: Job, noise: str, widths: tuple[int, ...], output: Path) -> None:
    """Run ``measure`` in a process, whose progress and errors go where this process's do."""
    options: dict[str, Any] = {"noise": noise, "group_size": job.group_size, "quantizer": job.quantizer}
    if widths:
        options["candidate_bits"] = widths
    # Not -m, which would take a folder named offline in the working directory.
    code = f"""
import sys
sys.path[:] = {[str(Path(offline.__file__).parents[1]), *sys.path]!r}
from offline.cli import run
from offline.operations.measure import measure
run(lambda _: measure({str(job.source.path)!r}, {str(output)!r}, **{options!r}))
"""
    status = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode
    if status:
        raise ValueError(
            f"{job.model}: expected to measure its expert matrices, got exit status {status} of offline.measure: "
            "the reason is printed above"
        )
