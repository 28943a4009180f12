"""Where what one run learned is kept for the next: statistics, and which files were found whole."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """``ALPHAQ_CACHE``, by default ``alphaq`` in the user's cache directory. It may not exist yet.

    Raises ValueError if there is no such place, for want of a home directory.
    """
    try:
        if chosen := os.environ.get("ALPHAQ_CACHE"):
            return Path(chosen).expanduser()
        if user := os.environ.get("XDG_CACHE_HOME"):
            return Path(user, "alphaq")
        return Path.home() / ".cache" / "alphaq"
    except RuntimeError:
        raise ValueError(
            "ALPHAQ_CACHE: expected a directory to keep files in, got none, and the user has no home directory: set it"
        ) from None
