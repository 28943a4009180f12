"""AlphaQ for vLLM: Mixture-of-Experts checkpoints in which every expert matrix has a width of its own.

    from alphaq_vllm import convert

    print(convert("Qwen/Qwen1.5-MoE-A2.7B", "OUT", bits=3.5))

``plan``, ``convert``, ``measure``, ``allocate``, ``inspect``, ``validate``, ``dequantize`` and ``upload`` do what the
commands of the same names do, with the same defaults. They are imported when they are first used.

``import alphaq_vllm.transformers`` lets ``from_pretrained`` of transformers load such checkpoints.
"""

from __future__ import annotations

from importlib import import_module
from logging import getLogger
from typing import TYPE_CHECKING, Any

from alphaq_vllm._offline import check_offline

if TYPE_CHECKING:
    from offline.operations.allocate import allocate as allocate
    from offline.operations.convert import convert as convert
    from offline.operations.dequantize import dequantize as dequantize
    from offline.operations.inspect import inspect as inspect
    from offline.operations.measure import measure as measure
    from offline.operations.options import ConvertOptions as ConvertOptions
    from offline.operations.options import MeasureOptions as MeasureOptions
    from offline.operations.prospect import plan as plan
    from offline.operations.upload import upload as upload
    from offline.operations.validate import validate as validate
    from offline.operations.width_options import WidthOptions as WidthOptions

__version__ = "0.1.0"
# Where each public name is defined.
_PUBLIC = {
    **{name: name for name in ("allocate", "convert", "dequantize", "inspect", "measure", "upload", "validate")},
    "plan": "prospect",
    **dict.fromkeys(("ConvertOptions", "MeasureOptions"), "options"),
    "WidthOptions": "width_options",
}
__all__ = [*_PUBLIC, "register"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_offline()
    return getattr(import_module(f"offline.operations.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


def register() -> None:
    """Make ``--quantization alphaq`` known to vLLM; the entry point of ``vllm.general_plugins``, safe to call again.

    It never raises: vLLM calls it in every process, and would serve no model at all. What is wrong is said when an
    AlphaQ checkpoint is to be served.
    """
    try:
        from alphaq_vllm.plugin import config  # noqa: F401
    except Exception as error:
        # vLLM shows messages of loggers below its own only.
        getLogger("vllm.alphaq").warning("This vLLM has no place for --quantization alphaq: %s", error)
