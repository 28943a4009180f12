"""Fetch a version of vLLM that has no wheel for CPUs, as far as it is Python: enough to import the plugin against it.

    python .ci/python_files.py VERSION FOLDER

The wheel for GPUs is downloaded; its compiled files are left out. The version gets "+cpu", which tells vLLM its
platform. Needs pip and the standard library only.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def main(version: str, folder: str) -> None:
    """Fill ``folder``, to be put on PYTHONPATH; a failing download ends the program with its status."""
    with tempfile.TemporaryDirectory() as downloads:
        wanted = ("--no-deps", "--only-binary=:all:", f"vllm=={version}")
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "-d", downloads, *wanted], check=True)
        (wheel,) = Path(downloads).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith(f"vllm-{version}.") or n.endswith((".py", ".json"))]
            archive.extractall(folder, names)
    information = Path(folder, f"vllm-{version}.dist-info")
    metadata = information / "METADATA"
    metadata.write_text(re.sub(r"^Version: .*", r"\g<0>+cpu", metadata.read_text(), count=1, flags=re.MULTILINE))
    information.rename(information.with_name(f"vllm-{version}+cpu.dist-info"))


if __name__ == "__main__":
    main(*sys.argv[1:])
