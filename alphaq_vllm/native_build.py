"""Native code as shared libraries: compiled on first use, for the processor at hand, and kept.

    python -m alphaq_vllm.native_build [INSTRUCTION_SET ...]

builds into the packages themselves, for images and for machines without a compiler.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from filelock import FileLock

from alphaq_vllm.cache import cache_directory


@dataclass(frozen=True)
class Sources:
    """What one library is compiled from: a directory, its file that includes all others, and options of its own."""

    directory: Path
    main: str
    flags: tuple[str, ...] = ()


_PACKAGES = Path(__file__).parents[1]
KERNEL = Sources(_PACKAGES / "alphaq_vllm/kernels/cpu/native", "layer.cpp")
# Sums and products are rounded one by one, so that all instruction sets compute the same bits.
QUANTIZERS = Sources(_PACKAGES / "offline/quantizers/native", "quantize.cpp", ("-ffp-contract=off",))
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
# Chooses an instruction set, or `none` for torch.
INSTRUCTION_SET = "ALPHAQ_CPU_KERNEL"

logger = logging.getLogger("alphaq_vllm")


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


def choose_instruction_set(sources: Sources, what: str, without: str) -> str:
    """The instruction set to compute with, or ``none`` for torch.

    It is the user's choice, or the best that this processor has and for which the library can be built. The log says
    why it is not the best of the processor; what, without: its subjects, the library and work that is done without one.

    Raises ValueError for a choice that this processor does not have.
    """
    has = supported()
    chosen = os.environ.get(INSTRUCTION_SET)
    if chosen and chosen not in (*has, "none"):
        raise ValueError(f"{INSTRUCTION_SET}: expected one of {', '.join((*has, 'none'))} here, got {chosen}")
    first_error: Exception | None = None
    for name in (chosen,) if chosen else has:
        if name == "none":
            return name
        try:
            load(sources, name)
        except (OSError, subprocess.SubprocessError) as error:
            first_error = first_error or error
            continue
        if first_error:
            logger.warning("%s uses %s, not %s: %s", what, name, has[0], first_error)
        return name
    logger.warning("%s: %s", without, first_error)
    return "none"


@cache
def load(sources: Sources, instruction_set: str) -> ctypes.CDLL:
    """The library for an instruction set.

    Raises OSError or subprocess.SubprocessError if it cannot be built, and ValueError if it cannot run here.
    """
    if instruction_set not in supported():
        raise ValueError(f"instruction_set: expected one of {supported()} here, got {instruction_set}")
    return ctypes.CDLL(str(library_path(sources, instruction_set)))


def library_path(sources: Sources, instruction_set: str) -> Path:
    """The library for an instruction set, built now if it was not before.

    Raises OSError or subprocess.SubprocessError if it cannot be built: no compiler, or nowhere to put it.
    """
    name = library_name(sources, instruction_set)
    if (shipped := sources.directory / name).is_file():
        return shipped
    if (compiler := find_compiler()) is None:
        raise OSError(NO_COMPILER)
    path = _private_directory() / name
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            compile_to(path, sources, instruction_set, compiler)
    return path


def library_name(sources: Sources, instruction_set: str) -> str:
    """A name that another machine, and an update of the sources, does not share."""
    total = sha256(repr((FLAGS, sources.flags, instruction_sets()[instruction_set])).encode())
    for source in sorted(sources.directory.glob("*.[hc]*")):
        total.update(source.read_bytes())
    return f"alphaq-{platform.machine()}-{instruction_set}-{total.hexdigest()[:16]}.so"


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: ``CXX``, or the first that is installed."""
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    return next(([found] for name in ("g++", "c++", "clang++") if (found := shutil.which(name))), None)


def compile_to(path: Path, sources: Sources, instruction_set: str, compiler: list[str]) -> None:
    """Write the library whole or not at all. Raises OSError or subprocess.SubprocessError."""
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        built = Path(directory, path.name)
        options = (*FLAGS, *sources.flags, *instruction_sets()[instruction_set])
        command = [*compiler, *options, str(sources.directory / sources.main), "-o", str(built)]
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
        for sources in (KERNEL, QUANTIZERS):
            compile_to(sources.directory / library_name(sources, name), sources, name, compiler)


if __name__ == "__main__":
    main()
