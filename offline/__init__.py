"""From a Hugging Face checkpoint to an AlphaQ checkpoint: measure, allocate, quantize, pack, write."""

from importlib.metadata import version

VERSION = version("alphaq-vllm")
