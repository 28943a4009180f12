"""The kernels' whole grids take long, and what they show changes with the kernels alone: ``make test`` runs a part.

``PASSED`` holds the digest of the sources for which ``make test-kernels``, which runs all, last passed.

    python -m tests.kernels.digest --write
"""

from __future__ import annotations

import sys
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
PASSED = Path(__file__).with_name("PASSED")
SUFFIXES = (".py", ".cpp", ".h")
SOURCES = (
    "alphaq_vllm/kernels", "alphaq_vllm/native_build.py", "alphaq_vllm/packing.py", "alphaq_vllm/format.py",
    "tests/kernels", "tests/emulator",
)  # fmt: skip


def digest() -> str:
    """The version of Triton, and one sum over the names and contents of all sources."""
    total = sha256()
    for source in SOURCES:
        path = ROOT / source
        files = [file for file in path.rglob("*") if file.suffix in SUFFIXES] if path.is_dir() else [path]
        for file in sorted(files):
            total.update(f"{file.relative_to(ROOT)} {sha256(file.read_bytes()).hexdigest()}\n".encode())
    return f"triton {version('triton')} {total.hexdigest()}\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    PASSED.write_text(digest())
