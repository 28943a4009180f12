"""Whether ``offline`` is the converter that came with this package: it is a common name for a folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def check_offline() -> None:
    """Raise ImportError, without running it, if another folder of that name comes first on the path."""
    root = Path(__file__).resolve().parents[1]
    spec = find_spec("offline")
    found = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    if not any(place.resolve() == root / "offline" for place in found):
        raise ImportError(
            f"offline: expected AlphaQ's package in {root}, got {', '.join(map(str, found)) or 'none'}: rename that "
            "folder, start from another directory, or install alphaq-vllm again"
        )
