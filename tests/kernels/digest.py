"""The kernels' whole grids take long, and what they show changes with the kernels alone: ``make test`` runs a part.

``PASSED`` has a line for the kernels of each device, with the digest of the sources for which ``make test-kernels``,
which runs all of ``make test-kernels-cpu`` and ``make test-kernels-gpu``, last passed.

    python -m tests.kernels.digest --write cpu
    python -m tests.kernels.digest --write gpu
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
# What the kernels of one device have nothing of, among what they share; and what is no part of a kernel or its tests.
OTHERS = {
    "cpu": ("alphaq_vllm/kernels/triton", "tests/kernels/triton", "tests/emulator"),
    "gpu": ("alphaq_vllm/kernels/cpu", "alphaq_vllm/native_build.py", "tests/kernels/cpu"),
}
OWN = ("tests/kernels/digest.py", "tests/kernels/test_digest.py")


def digest(device: str) -> str:
    """One sum over the names and contents of all sources, after the device and, for GPUs, the version of Triton."""
    total = sha256()
    for source in SOURCES:
        path = ROOT / source
        files = [file for file in path.rglob("*") if file.suffix in SUFFIXES] if path.is_dir() else [path]
        for file in sorted(files):
            name = file.relative_to(ROOT)
            if not any(name.is_relative_to(other) for other in (*OTHERS[device], *OWN)):
                total.update(f"{name} {sha256(file.read_bytes()).hexdigest()}\n".encode())
    triton = f"triton {version('triton')} " if device == "gpu" else ""
    return f"{device} {triton}{total.hexdigest()}"


def passed() -> dict[str, str]:
    """The lines of ``PASSED`` by device."""
    return {line.partition(" ")[0]: line for line in PASSED.read_text().splitlines()} if PASSED.exists() else {}


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"] or sys.argv[2:] not in [[device] for device in OTHERS]:
        sys.exit(__doc__)
    lines = passed() | {sys.argv[2]: digest(sys.argv[2])}
    PASSED.write_text("".join(f"{lines[device]}\n" for device in sorted(lines)))
