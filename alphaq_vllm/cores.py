"""How many cores this process may use: by its affinity, and by the quotas of its control groups."""

from __future__ import annotations

import math
import os
from pathlib import Path


def available_cores() -> int:
    """The number of cores that this process may keep busy, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return within_quota(cores)


def within_quota(threads: int) -> int:
    """As many of some threads, at least 1, as the quota lets run at once."""
    return max(1, int(min(threads, cpu_quota())))


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """Cores whose time this process may use, by the least quota of its control group and those above; inf for none.

    root, membership: where Linux mounts control groups, of version 2 or 1, and says which are this process's.
    """
    quota = math.inf
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        path = root / controllers / group.lstrip("/")
        # In a container its own group may be mounted in the place of the root.
        for directory in (path, *path.parents[: len(Path(group).parts)], root / controllers):
            quota = min(quota, _quota_in(directory))
    return quota


def _quota_in(directory: Path) -> float:
    try:
        if (directory / "cpu.max").is_file():
            limit, period = (directory / "cpu.max").read_text().split()
        else:
            limit, period = ((directory / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if limit == "max" or int(limit) < 0 else int(limit) / int(period)
    except (OSError, ValueError):
        return math.inf
