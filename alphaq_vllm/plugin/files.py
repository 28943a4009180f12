"""Whether a checkpoint's files are those that the conversion wrote, before anything of them is served."""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path

from alphaq_vllm.checksums import EDITABLE, SUMS, compare_sums, refuse
from alphaq_vllm.plugin._compat import logger

VERIFY = "ALPHAQ_VERIFY"


@cache
def check_files(directory: Path) -> None:
    """Compare a checkpoint with its SHA-256 sums, once in a process, and say so in the log.

    That takes a second for each gigabyte and core, and leaves the files in the page cache for loading. Not checked are
    names on the Hub, whose client checks what it downloads, and anything if ``ALPHAQ_VERIFY`` is 0.
    What people edit may have changed: that is a warning.
    Raises ValueError or OSError for another file that is missing or not what was written.
    """
    if not directory.is_dir() or os.environ.get(VERIFY) == "0":
        return
    if not (directory / SUMS).is_file():
        logger.warning("%s has no %s: AlphaQ cannot tell whether its files are damaged", directory, SUMS)
        return
    start = time.monotonic()
    try:
        comparison = compare_sums(directory)
        refuse(directory, comparison.without(EDITABLE))
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}, or set {VERIFY}=0 if it was changed on purpose") from error
    if changed := [*comparison.missing, *comparison.different]:
        logger.warning("%s: served although changed since the conversion: %s", directory, ", ".join(changed))
    seconds = time.monotonic() - start
    logger.info("AlphaQ checked %d files of %s in %.1f s", len(comparison.names), directory, seconds)
