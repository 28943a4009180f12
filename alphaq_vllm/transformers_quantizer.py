"""AlphaQ checkpoints in transformers: ``from_pretrained`` dequantizes them, to the values of ``offline.dequantize``.

transformers loads every parameter by a converter that collects the checkpoint's tensors for it. Those given here
collect the stored tensors of a linear layer, or of all experts of a layer, whose parameter is one for all of them. What
comes out is an ordinary model: it keeps no trace of the quantization, and is saved as plain weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from alphaq_vllm import linear_packing, packing
from alphaq_vllm.format import GRID, PACKED, QUANT_METHOD, SCALE, WEIGHTS_FILE, AlphaQSpec

if TYPE_CHECKING:
    from offline.source.fused import FusedPart


@register_quantization_config(QUANT_METHOD)
class AlphaQHfConfig(QuantizationConfigMixin):
    """The checkpoint's ``quantization_config``."""

    # What makes transformers forget the quantization once the model is loaded.
    dequantize = True

    def __init__(self, spec: AlphaQSpec) -> None:
        # Of its own methods, transformers has an enumeration.
        super().__init__(quant_method=QUANT_METHOD)  # type: ignore[arg-type]
        self.spec = spec

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *_: Any, **__: Any) -> AlphaQHfConfig:
        """Parse and check the JSON form. Raises ValueError as ``AlphaQSpec.from_dict`` does."""
        return cls(AlphaQSpec.from_dict(config_dict))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return self.spec.to_dict()


@register_quantizer(QUANT_METHOD)
class AlphaQHfQuantizer(HfQuantizer):
    """What ``from_pretrained`` does with an AlphaQ checkpoint. Refuses one that lies, naming the tensor."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError for a model that is not quantized yet."""
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config: expected a checkpoint that python -m offline.convert wrote, got one that is not "
                "quantized: convert it first"
            )

    def update_tp_plan(self, config: Any) -> Any:
        """The config without what stops transformers; raises ValueError for ranks that share the model."""
        if getattr(config, "distributed_config", None) is not None:
            raise ValueError(
                "distributed_config, tp_plan: expected none for an AlphaQ checkpoint, whose tensors cannot be shared "
                "among ranks of transformers: use device_map, or serve it with vLLM"
            )
        # Where transformers is told to find the weights. Absent from checkpoints that somebody edited.
        vars(config).pop(WEIGHTS_FILE, None)
        return config

    # transformers declares what it passes by name as **kwargs, here and in ``convert``.
    def _process_model_before_weight_loading(  # type: ignore[override]
        self, model: torch.nn.Module, checkpoint_files: Sequence[str], **kwargs: Any
    ) -> None:
        # Only here, because vLLM imports this module too, and needs none of these.
        from offline.source.alphaq import check_alphaq
        from offline.source.architectures import experts_size
        from offline.source.checkpoint import open_checkpoint
        from offline.source.recognition import family_of

        checkpoint = open_checkpoint(str(Path(checkpoint_files[0]).parent))
        check_alphaq(checkpoint)
        family = family_of(checkpoint)
        *first, down = family.projections
        together = ".experts.gate_up_proj" if family.gated else ".experts.up_proj"
        self.expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
        # transformers may compute with another orientation than is published.
        gate_up, down_proj = (next(tuple(shape) for name, (shape, _) in self.expected.items() if name.endswith(end))
                              for end in (together, ".experts.down_proj"))  # fmt: skip
        fused = family.fused.oriented(gate_up, down_proj, experts_size(checkpoint.config), family.gated)
        family = replace(family, fused=fused)
        parts = [family.part("experts", projection) for projection in family.projections]
        self.conversions = [
            WeightConverter(_stored(*first), together, [DequantizeExperts(parts[:-1])]),
            WeightConverter(_stored(down), ".experts.down_proj", [DequantizeExperts(parts[-1:])]),
            WeightConverter([rf"\.{PACKED}$", rf"\.{SCALE}$"], ".weight", [DequantizeLinear()]),
        ]

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """Those of the model, after ours: the first that knows a tensor's name takes it."""
        self.plain = weight_conversions
        return [*self.conversions, *weight_conversions]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Refuse what transformers lets pass in a quantized model, and make it an ordinary one."""
        dtype_plan = model._get_dtype_plan(model.dtype)
        kept = {re.compile(pattern.replace("*", ".*")): dtype for pattern, dtype in dtype_plan.items()}
        for name, tensor in model.state_dict(keep_vars=True).items():
            shape, dtype = self.expected[name]
            if not hasattr(tensor, "_is_hf_initialized"):
                raise ValueError(
                    f"{name}: expected in the checkpoint, got nothing: copy the checkpoint again or convert again"
                )
            if tensor.shape != shape:
                raise ValueError(
                    f"{name}: expected shape {tuple(shape)} as config.json says, got {tuple(tensor.shape)}: "
                    "convert the source again"
                )
            # In a quantized model transformers leaves the dtype of a tensor that it renames as it is stored.
            tensor.data = tensor.data.to(next((kept[pattern] for pattern in kept if pattern.search(name)), dtype))
        # It is saved as an ordinary checkpoint would be: its own conversions, reversed.
        model._weight_conversions = [c for c in self.plain if c.was_used() or not isinstance(c, PrefixChange)]
        return model

    def is_serializable(self) -> bool:
        """True: as plain weights."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether it can be trained: it is an ordinary model."""
        return True


class DequantizeExperts(ConversionOps):
    """From the stored tensors of all experts of a layer to the parameter that holds them all.

    parts: where each projection lies in it; their stored tensors are the source patterns, in this order.
    """

    def __init__(self, parts: Sequence[FusedPart]) -> None:
        self.parts = parts

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        model: Any,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """The parameter of ``model`` named ``full_layer_name``, in its dtype, on the device of the stored tensors."""
        parameter = model.get_parameter(full_layer_name)
        fused = torch.empty(parameter.shape, dtype=parameter.dtype, device=input_dict[source_patterns[0]][0].device)
        for i, part in enumerate(self.parts):
            tensors = zip(*(input_dict.pop(pattern) for pattern in source_patterns[3 * i : 3 * i + 3]), strict=True)
            for expert, (packed, scale, grid) in enumerate(tensors):
                matrix = part.view(fused[expert])
                num_bits = 32 * packed.shape[1] // matrix.shape[1]
                matrix.copy_(packing.dequantize(packed, scale, grid, num_bits, fused.dtype))
        return {full_layer_name: fused}


class DequantizeLinear(ConversionOps):
    """From the stored tensors of a linear layer, which are the source patterns, to its weight."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        model: Any,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """The parameter of ``model`` named ``full_layer_name``, in its dtype, on the device of the stored tensors."""
        parameter = model.get_parameter(full_layer_name)
        (packed,), (scale,) = (input_dict[pattern] for pattern in source_patterns)
        num_bits = 32 * packed.shape[1] // parameter.shape[1]
        return {full_layer_name: linear_packing.dequantize(packed, scale, num_bits, parameter.dtype)}


def _stored(*projections: str) -> list[str]:
    """Patterns of the names of the stored tensors of projections of experts."""
    return [
        rf"\.experts\.\d+\.{projection}\.{suffix}$" for projection in projections for suffix in (PACKED, SCALE, GRID)
    ]
