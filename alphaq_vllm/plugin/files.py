"""Whether a checkpoint's files are those that the conversion wrote, before anything of them is served."""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path

from alphaq_vllm.checksums import EDITABLE, SUMS, compare_sums, refuse
from alphaq_vllm.plugin._compat import logger
from alphaq_vllm.plugin.verified import VerifiedSums

VERIFY = "ALPHAQ_VERIFY"
FULL, ONCE, OFF = "full", "once", "off"
# The numbers are what older versions took.
MODES = {FULL: FULL, ONCE: ONCE, OFF: OFF, "0": OFF, "1": FULL, "": ONCE}


@cache
def check_files(directory: Path) -> None:
    """Compare a checkpoint with its SHA-256 sums, once in a process, and say so in the log.

    Reading takes a second for each gigabyte and core, and leaves the files in the page cache for loading. So
    ``ALPHAQ_VERIFY`` says what is read: files that changed since they were last found right (``once``, which is the
    default), all (``full``) or none (``off``). Names on the Hub are left to its client, which checks what it downloads.
    What people edit may have changed: that is a warning.
    Raises ValueError or OSError for another file that is missing or not what was written.
    """
    mode = verify_mode()
    if not directory.is_dir() or mode == OFF:
        return
    if not (directory / SUMS).is_file():
        logger.warning("%s has no %s: AlphaQ cannot tell whether its files are damaged", directory, SUMS)
        return
    start = time.monotonic()
    sums = VerifiedSums(directory, reuse=mode == ONCE)
    try:
        comparison = compare_sums(directory, sums.sum_of)
        # Before what differs is refused, so that the rest is not read again when that was repaired.
        problem = sums.save(comparison.found.keys() - set(comparison.different))
        refuse(directory, comparison.without(EDITABLE))
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}, or set {VERIFY}={OFF} if it was changed on purpose") from error
    if changed := [*comparison.missing, *comparison.different]:
        logger.warning("%s: served although changed since the conversion: %s", directory, ", ".join(changed))
    logger.info(
        "AlphaQ checked %d files of %s in %.1f s (%d read, %d unchanged since they were read)",
        len(comparison.names),
        directory,
        time.monotonic() - start,
        len(sums.read),
        len(comparison.found) - len(sums.read),
    )
    if problem:
        logger.info("AlphaQ will read these files again at the next start, for it cannot keep their sums: %s", problem)


def verify_mode() -> str:
    """What ``ALPHAQ_VERIFY`` asks for: ``FULL``, ``ONCE`` or ``OFF``.

    Raises ValueError for anything else.
    """
    value = os.environ.get(VERIFY, "").lower()
    if value not in MODES:
        raise ValueError(
            f"{VERIFY}: expected {FULL} (read all files at every start), {ONCE} (read what changed) or {OFF}, "
            f"got {value!r}: set it to one of them"
        )
    return MODES[value]
