"""gpt-oss in vLLM: experts with biases, and a model that loads experts one by one.

vLLM's own model takes the experts of a layer as one tensor and passes over tensors of single experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.model_executor.models import gpt_oss

from alphaq_vllm.kernels import GPT_OSS, Gate
from alphaq_vllm.plugin._compat import RoutedExperts, set_weight_attrs, weight_loader
from alphaq_vllm.plugin.moe import SHARDS, AlphaQMoEMethod

# Parameters by the checkpoint's names for the biases of all experts of a layer.
BIASES = {"gate_up_proj_bias": "w13_bias", "down_proj_bias": "w2_bias"}


class GptOssMoEMethod(AlphaQMoEMethod):
    """One layer of gpt-oss's routed experts; the checkpoint has their biases as the source had."""

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate what this rank's experts take, and their biases."""
        super().create_weights(
            layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra_weight_attrs
        )
        local = len(self.global_ids)
        shapes = {"w13_bias": (local, 2, intermediate_size_per_partition), "w2_bias": (local, hidden_size)}
        for name, parameter in BIASES.items():
            param = torch.nn.Parameter(torch.empty(shapes[parameter], dtype=params_dtype), requires_grad=False)
            layer.register_parameter(parameter, param)
            set_weight_attrs(param, {"weight_loader": weight_loader(self._load_bias, name)})

    def load(self, layer: RoutedExperts, name: str, tensor: torch.Tensor) -> None:
        """Load one tensor of the checkpoint by its name below ``prefix``.

        Raises ValueError if the layer has no place for it.
        """
        if name in BIASES:
            param = getattr(layer, BIASES[name])
            param.weight_loader(param, tensor)
            return
        shards = {projection: shard for shard, projection in self.projection_names.items()}
        parts = re.fullmatch(r"(\d+)\.(\w+)\.(\w+)", name)
        if parts is None or parts[2] not in shards or parts[3] not in self.stored:
            raise ValueError(
                f"{self.prefix}.{name}: expected a tensor of quantized experts or their biases: the bit map in "
                "config.json does not belong to these weights, convert again"
            )
        shard = shards[parts[2]]
        param = getattr(layer, f"{SHARDS[shard][0]}_{parts[3]}")
        param.weight_loader(param, tensor, name, shard_id=shard, expert_id=int(parts[1]))

    def _load_bias(self, name: str, param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
        """Copy this rank's part of the biases of all experts, ``[num_experts, out_features]``."""
        gate_up = BIASES[name] == "w13_bias"
        size = self.shapes["w13" if gate_up else "w2"][0]
        expected = (self.moe.num_experts, 2 * size * self.tp_size if gate_up else size)
        if tuple(loaded_weight.shape) != expected or not loaded_weight.is_floating_point():
            raise ValueError(
                f"{self.prefix}.{name}: expected floating point of shape {expected}, got {loaded_weight.dtype} of "
                f"shape {tuple(loaded_weight.shape)}: config.json does not belong to these weights, convert again"
            )
        bias = loaded_weight[self.global_ids]
        if gate_up:
            # The two alternate.
            bias = bias.unflatten(1, (-1, 2)).mT.narrow(2, self.tp_rank * size, size)
        elif self.tp_rank > 0:
            # vLLM sums over ranks, and the bias is to be in that once.
            bias = torch.zeros_like(bias)
        param.data.copy_(bias)
        self.loaded.add(f"{self.prefix}.{name}")

    def _expected(self) -> set[str]:
        return super()._expected() | {f"{self.prefix}.{name}" for name in BIASES}

    def _check_finite(self, layer: RoutedExperts) -> None:
        super()._check_finite(layer)
        for name, parameter in BIASES.items():
            if not getattr(layer, parameter).isfinite().all():
                raise ValueError(
                    f"{self.prefix}.{name}: expected finite values, got NaN or Inf: the checkpoint is damaged, convert "
                    "again"
                )

    def _gate(self) -> Gate:
        return GPT_OSS


class GptOssForCausalLM(gpt_oss.GptOssForCausalLM):
    """vLLM's model, which vLLM takes this for; other quantizations load as ever."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint: the tensors of AlphaQ's experts here, the others as vLLM does."""
        layers = {
            layer.quant_method.prefix: layer
            for layer in self.modules()
            if isinstance(layer, RoutedExperts) and isinstance(layer.quant_method, GptOssMoEMethod)
        }

        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                module, _, below = name.partition(".experts.")
                layer = layers.get(f"{module}.experts")
                if layer is None:
                    yield name, tensor
                else:
                    layer.quant_method.load(layer, below, tensor)

        return super().load_weights(others())
