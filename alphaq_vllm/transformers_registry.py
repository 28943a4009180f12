"""Makes the quantizer known to transformers once that is imported, and never imports transformers itself."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

REGISTRY = "transformers.quantizers.auto"
OLDEST = "5.19"


def register_when_imported() -> None:
    """Register the quantizer now if transformers has its registry imported, else as soon as it has."""
    if REGISTRY in sys.modules:
        register(sys.modules[REGISTRY])
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


def register(registry: Any) -> None:
    """Register the quantizer in transformers' module of this name.

    With a version of transformers that lacks what it needs, loading an AlphaQ checkpoint raises ImportError.
    """
    # Not above, because it imports torch.
    from alphaq_vllm.format import QUANT_METHOD

    if QUANT_METHOD in registry.AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    if hasattr(registry.HfQuantizer, "update_weight_conversions"):
        from alphaq_vllm import transformers_quantizer  # noqa: F401
    else:
        registry.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = _TooOld


class _TooOld:
    """In the place of a config that this version of transformers could do nothing with."""

    @classmethod
    def from_dict(cls, *_: Any, **__: Any) -> NoReturn:
        """Raise ImportError."""
        import transformers

        raise ImportError(
            f"AlphaQ checkpoints need transformers {OLDEST} or newer, got {transformers.__version__}: upgrade it, or "
            "run python -m offline.dequantize CHECKPOINT OUT and load OUT"
        )


class _RegistryFinder(MetaPathFinder):
    """Has the registry imported as ever, and the quantizer registered after that."""

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
