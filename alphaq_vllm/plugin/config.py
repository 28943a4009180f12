"""AlphaQ as vLLM's quantization ``alphaq``: which layer is served by which method.

Imported in every process of vLLM, whatever that serves. So what only AlphaQ needs is imported when a config is made,
and a version of vLLM that lacks some of it is an error for AlphaQ alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from alphaq_vllm._offline import check_offline
from alphaq_vllm.format import QUANT_METHOD, SCALE, AlphaQSpec, LinearFormat, shard_ids

if TYPE_CHECKING:
    from alphaq_vllm.plugin._compat import RoutedExperts, WeightsMapper
    from alphaq_vllm.plugin.linear import AlphaQLinearMethod
    from alphaq_vllm.plugin.moe import AlphaQMoEMethod


@register_quantization_config(QUANT_METHOD)
class AlphaQConfig(QuantizationConfig):
    """The checkpoint's ``quantization_config``, checked, with module names as vLLM has them.

    spec: None for a model in full precision, of which ``maybe_update_config`` chooses the widths; settings: for that.
    quantizer: of the experts while they are loaded, None where they are stored quantized. dummy: whether vLLM makes up
    weights instead of loading them.
    """

    def __init__(self, spec: AlphaQSpec | None = None, settings: Mapping[str, Any] | None = None) -> None:
        from alphaq_vllm.plugin import _compat
        from alphaq_vllm.plugin.report import LoadReport

        _compat.check_version()
        _compat.check_interface()
        _take_models()
        super().__init__()
        self.settings = settings or {}
        self.quantizer: str | None = None
        self.dummy = False
        self.decided = spec is not None
        self.report = LoadReport()
        self._adopt(spec or AlphaQSpec(128, {}))

    def _adopt(self, spec: AlphaQSpec) -> None:
        self.group_size = spec.group_size
        self.num_bits = dict(spec.num_bits)
        self.linear = dict(spec.linear)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be what vLLM sends to its workers, each of which is a new process."""
        self.__dict__.update(state)
        _take_models()

    def __repr__(self) -> str:
        return f"AlphaQConfig(group_size={self.group_size}, modules={len(self.num_bits)}, linear={len(self.linear)})"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AlphaQConfig:
        """Parse ``quantization_config``; raises ValueError as ``AlphaQSpec.from_dict`` does.

        One that --hf-overrides gives to a model in full precision has settings in place of a format version.
        """
        if "format_version" not in config and "num_bits" not in config:
            return cls(settings={key: value for key, value in config.items() if key != "quant_method"})
        return cls(AlphaQSpec.from_dict(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> None:
        """None: no other method's checkpoint is AlphaQ's. Raises ValueError if the user says that it is."""
        method = hf_quant_cfg.get("quant_method")
        if user_quant == QUANT_METHOD != method:
            check_offline()
            from alphaq_vllm.plugin.online import refuse_quantized

            refuse_quantized(method)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check the files of a checkpoint, or choose the widths of a model in full precision.

        vLLM calls it before it starts its workers.
        Raises ValueError or OSError as ``check_load_format``, ``check_path``, ``check_files`` and ``choose_online`` do.
        """
        from alphaq_vllm.paths import check_path
        from alphaq_vllm.plugin._compat import weights_asked_for
        from alphaq_vllm.plugin.support import DUMMY, check_load_format

        load_format, elsewhere = weights_asked_for()
        check_load_format(load_format)
        self.dummy = load_format == DUMMY
        here = not self.dummy and not elsewhere
        if here and Path(model_name).is_dir():
            check_path(Path(model_name))
        if self.decided:
            from alphaq_vllm.plugin.files import check_files

            if here:
                check_files(Path(model_name))
            return
        check_offline()
        from alphaq_vllm.plugin.online import choose_online

        online = choose_online(model_name, revision, self.settings)
        self.quantizer, self.decided = online.quantizer, True
        self._adopt(online.spec)
        if hf_config is not None:
            # vLLM keys what it compiles by the model's config, and the widths are constants of that.
            hf_config.alphaq_online = online.spec.to_dict()

    @classmethod
    def get_name(cls) -> str:
        """The name given to ``--quantization``."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Activation dtypes; float32 is served on CPUs only, which the MoE method checks."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere: the first generation with bfloat16 matrix instructions."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No file beside ``config.json``."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename the quantized modules as vLLM renames the checkpoint's tensors.

        Raises ValueError for a linear layer whose scales the model would load under a name of another method.
        """
        self.num_bits = hf_to_vllm_mapper.apply_dict(self.num_bits)
        from alphaq_vllm.plugin.linear import option_of

        linear: dict[str, LinearFormat] = {}
        for name, linear_format in self.linear.items():
            # As tensors are renamed: some rules end in a dot, which the name of a head is not followed by.
            renamed = hf_to_vllm_mapper.apply_list([f"{name}.{SCALE}"])
            if not all(new.endswith(f".{SCALE}") for new in renamed):
                raise ValueError(
                    f"{name}: vLLM's model for this device renames {SCALE} as for weights in fp8, and would not load "
                    f"this quantized linear layer: serve on a GPU, or convert with {option_of(name)} 16"
                )
            linear |= {new.removesuffix(f".{SCALE}"): linear_format for new in renamed}
        self.linear = linear

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """AlphaQ for the experts and linear layers that the config names; the rest stays as it is in the checkpoint."""
        from alphaq_vllm.plugin._compat import LinearBase, ParallelLMHead, RoutedExperts, UnquantizedLinearMethod

        method: AlphaQMoEMethod | AlphaQLinearMethod | None = None
        if isinstance(layer, RoutedExperts):
            method = self._experts_method(layer, prefix)
        elif isinstance(layer, LinearBase):
            method = self._linear_method(prefix)
            if method is None:
                return UnquantizedLinearMethod()
        elif isinstance(layer, ParallelLMHead):
            method = self._linear_method(self._head(prefix))
        if method:
            method.report, method.dummy = self.report, self.dummy
            self.report.expect(method.prefix)
        return method

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> AlphaQMoEMethod | None:
        module = self._experts_module(prefix)
        if module is None:
            return None
        projections = self.num_bits[module]
        shards = shard_ids(projections)
        bits = {shards[name]: widths for name, widths in projections.items()}
        names = {shards[name]: name for name in projections}
        widths = tuple(sorted({b for experts in self.num_bits.values() for bits in experts.values() for b in bits}))
        arguments = (layer.moe_config, module, self.group_size, bits, widths, names)
        if self.quantizer:
            from alphaq_vllm.plugin.online import OnlineMoEMethod

            return OnlineMoEMethod(*arguments, quantizer=self.quantizer)
        from alphaq_vllm.plugin.moe import AlphaQMoEMethod
        from alphaq_vllm.plugin.support import GPT_OSS_ACTIVATION

        if layer.moe_config.activation.value == GPT_OSS_ACTIVATION:
            from alphaq_vllm.plugin.gpt_oss import GptOssMoEMethod

            return GptOssMoEMethod(*arguments)
        return AlphaQMoEMethod(*arguments)

    def _experts_module(self, prefix: str) -> str | None:
        """The bit map's name for the experts that vLLM calls ``prefix``; None if they are not quantized.

        Some of vLLM's models name a layer's block otherwise than they load it: MiniMax-M2 has ``mlp`` for
        ``block_sparse_moe``. Raises ValueError if the bit map has something else in the same layer.
        """
        from alphaq_vllm.plugin.drafts import draft_module

        layer = re.match(r".*\blayers\.\d+\.", prefix)
        if prefix in self.num_bits or not layer:
            return prefix if prefix in self.num_bits else None
        if (draft := draft_module(prefix, self.num_bits)) is not None:
            return draft
        others = [module for module in self.num_bits if module.startswith(layer.group())]
        if not others:
            return None
        if len(others) == 1 and re.fullmatch(r"\w+\.experts", others[0].removeprefix(layer.group())):
            return others[0]
        raise ValueError(
            f"{others[0]}: vLLM calls these experts {prefix}, which the bit map does not have: this model "
            "cannot be served with --quantization alphaq yet"
        )

    def _head(self, prefix: str) -> str:
        """The config's name for the head that vLLM calls ``prefix``: models that draft have names of their own."""
        _, _, name = prefix.rpartition(".")
        return next((head for head in self.linear if head.rpartition(".")[2] == name), prefix)

    def _linear_method(self, prefix: str) -> AlphaQLinearMethod | None:
        from alphaq_vllm.plugin.linear import AlphaQLinearMethod

        parent, _, name = prefix.rpartition(".")
        fused = [] if prefix in self.linear else self.packed_modules_mapping.get(name, [])
        parts = [f"{parent}.{part}" for part in fused] or [prefix]
        formats = [self.linear.get(part) for part in parts]
        if len(set(formats)) > 1:
            raise ValueError(
                f"{prefix}: vLLM fuses {', '.join(parts)}, so they must be stored alike, got {formats}: convert again"
            )
        return AlphaQLinearMethod(prefix, formats[0], parts) if formats[0] else None


def _take_models() -> None:
    """Have vLLM build AlphaQ's variants of its models, in this process, which has an AlphaQ checkpoint to serve.

    They load other checkpoints as vLLM's own do.
    """
    from alphaq_vllm.plugin._compat import ModelRegistry

    ModelRegistry.register_model("GptOssForCausalLM", "alphaq_vllm.plugin.gpt_oss:GptOssForCausalLM")
