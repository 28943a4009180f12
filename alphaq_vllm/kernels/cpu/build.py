"""The native kernel as a shared library: compiled on first use, for the processor at hand, and kept.

    python -m alphaq_vllm.kernels.cpu.build [INSTRUCTION_SET ...]

builds into the package itself, for images and for machines without a compiler.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path

from filelock import FileLock

from alphaq_vllm.cache import cache_directory

SOURCES = Path(__file__).with_name("native")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi")
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
# By machine, the best first: the features that a processor must have, which are the compiler's options as well.
INSTRUCTION_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "amx": (*_AVX512, "avx512vnni", "avx512bf16", "amx-tile", "amx-int8", "amx-bf16"),
        "avx512_vnni": (*_AVX512, "avx512vnni"),
        "avx512": _AVX512,
        "avx_vnni": (*_AVX2, "avxvnni"),
        "avx2": _AVX2,
    },
    "aarch64": {"neon_dotprod": ("dotprod",)},
}
# As Linux names features where it does so differently.
KERNEL_NAMES = {
    "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16", "avxvnni": "avx_vnni", "amx-tile": "amx_tile",
    "amx-int8": "amx_int8", "amx-bf16": "amx_bf16", "dotprod": "asimddp",
}  # fmt: skip
PORTABLE = "portable"
NO_COMPILER = "no C++ compiler: install g++, or name one in CXX"


def instruction_sets(machine: str = platform.machine()) -> dict[str, tuple[str, ...]]:
    """Instruction sets of a kind of machine, by default of this one, the best first, with the compiler's options."""
    options = {
        name: ("-march=armv8.2-a+dotprod",) if machine == "aarch64" else tuple(f"-m{feature}" for feature in features)
        for name, features in INSTRUCTION_SETS.get(machine, {}).items()
    }
    return {**options, PORTABLE: ()}


@cache
def supported() -> tuple[str, ...]:
    """The instruction sets that this process can use, the best first; the last one is always ``portable``."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    has = {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}
    known = INSTRUCTION_SETS.get(platform.machine(), {})
    return tuple(
        name
        for name in instruction_sets()
        if all(KERNEL_NAMES.get(feature, feature) in has for feature in known.get(name, ()))
        and (name != "amx" or _may_use_tiles())
    )


def _may_use_tiles() -> bool:
    """Ask Linux for the registers of AMX, which it gives on demand: arch_prctl(ARCH_REQ_XCOMP_PERM, TILEDATA)."""
    return ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


def library_path(instruction_set: str) -> Path:
    """The library for an instruction set, built now if it was not before.

    Raises OSError or subprocess.SubprocessError if it cannot be built: no compiler, or nowhere to put it.
    """
    name = library_name(instruction_set)
    if (shipped := SOURCES / name).is_file():
        return shipped
    if (compiler := find_compiler()) is None:
        raise OSError(NO_COMPILER)
    path = _private_directory() / name
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            compile_to(path, instruction_set, compiler)
    return path


def library_name(instruction_set: str) -> str:
    """A name that another machine, and an update of the sources, does not share."""
    total = sha256(repr((FLAGS, instruction_sets()[instruction_set])).encode())
    for source in sorted(SOURCES.glob("*.[hc]*")):
        total.update(source.read_bytes())
    return f"alphaq-{platform.machine()}-{instruction_set}-{total.hexdigest()[:16]}.so"


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: ``CXX``, or the first that is installed."""
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    return next(([found] for name in ("g++", "c++", "clang++") if (found := shutil.which(name))), None)


def compile_to(path: Path, instruction_set: str, compiler: list[str]) -> None:
    """Write the library whole or not at all. Raises OSError or subprocess.SubprocessError."""
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        built = Path(directory, path.name)
        command = [
            *compiler,
            *FLAGS,
            *instruction_sets()[instruction_set],
            str(SOURCES / "layer.cpp"),
            "-o",
            str(built),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        if result.returncode:
            raise OSError(f"{shlex.join(command)}: {(result.stderr.strip() or 'failed').splitlines()[0]}")
        built.replace(path)


def _private_directory() -> Path:
    """A directory that nobody else can write to: what lies there is loaded into this process.

    ``kernels`` in the directory of ``alphaq_vllm.cache``, or else a new one that is this process's alone.
    """
    try:
        directory = cache_directory() / "kernels"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(directory, os.W_OK):
            return directory
    except (OSError, ValueError):
        # No home directory, or one that cannot be written to.
        pass
    return Path(tempfile.mkdtemp(prefix="alphaq-"))


def main() -> None:
    """The command."""
    if (compiler := find_compiler()) is None:
        sys.exit(NO_COMPILER)
    for name in sys.argv[1:] or instruction_sets():
        if name not in instruction_sets():
            sys.exit(f"{name}: expected one of {', '.join(instruction_sets())}")
        compile_to(SOURCES / library_name(name), name, compiler)


if __name__ == "__main__":
    main()
