"""From a Hugging Face checkpoint to an AlphaQ checkpoint: measure, allocate, quantize, pack, write."""

from importlib.util import find_spec

from alphaq_vllm import __version__ as VERSION

if find_spec("torch") is None:
    # With this name, ``python -m offline.COMMAND`` prints the sentence alone.
    raise ModuleNotFoundError(
        "offline: expected the packages that it needs, got none: run python3 .ci/install.py VENV, then VENV/bin/python",
        name="offline",
    )

__all__ = ["VERSION"]
