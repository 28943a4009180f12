"""What GPU kernels need before they serve a layer: to be compiled, and once to be compared with its weights."""

from __future__ import annotations

from pathlib import Path

import torch

from alphaq_vllm.cache import cache_directory
from alphaq_vllm.kernels import MoEWeights
from alphaq_vllm.kernels.choice import KERNELS, chosen_kernels
from alphaq_vllm.plugin._compat import FusedMoEConfig, RoutedExperts, current_platform, get_current_vllm_config, logger

# Fingerprints of kernels that passed, in the cache, by name alone.
PASSED = "checked-kernels"


def check_choice() -> None:
    """Raise ValueError for a choice of kernels that there is not, or that vLLM cannot capture in CUDA graphs."""
    chosen = chosen_kernels()
    if current_platform.is_cpu() or chosen != "torch" or get_current_vllm_config().model_config.enforce_eager:
        return
    raise ValueError(
        f"{KERNELS}=torch: expected --enforce-eager, since torch waits for the GPU, which no CUDA graph can hold, "
        f"got none: add --enforce-eager, or set {KERNELS} to plain"
    )


class Preparation:
    """What a layer's experts go through on a GPU, begun when they are loaded and still in the order of the checkpoint.

    Nothing is imported before: Triton may be absent where there is no GPU.
    """

    def __init__(self, moe: FusedMoEConfig, layer: RoutedExperts, weights: MoEWeights, made_up: bool) -> None:
        """made_up: whether the weights are vLLM's dummies, of which some may be no numbers."""
        from alphaq_vllm.kernels.triton.check import Sample, fingerprint, routing_of

        self.dtype = moe.in_dtype
        self.routing = routing_of(weights, moe.experts_per_token, layer.expert_map, layer.apply_router_weight_on_input)
        self.fingerprint = fingerprint(weights, self.routing, self.dtype)
        self.sample = None
        if not made_up and not _has_passed(self.fingerprint):
            logger.info(
                "AlphaQ compiles its kernels for %s and compares them with the weights, once for this GPU and these "
                "versions: some minutes", torch.cuda.get_device_name()
            )  # fmt: skip
            self.sample = Sample.of(weights, self.routing, self.dtype)

    def finish(self, weights: MoEWeights) -> None:
        """Compile, and raise ValueError if what kernels compute differs. weights: in the order of the GPU."""
        from alphaq_vllm.kernels.triton.check import check
        from alphaq_vllm.kernels.triton.layer import warm_up

        if self.sample is not None:
            check(weights, self.sample)
            _note(self.fingerprint)
            return
        _, top_k = self.routing.topk_ids.shape
        warm_up(weights, top_k, self.dtype, self.routing.expert_map, self.routing.apply_router_weight_on_input)


def _has_passed(fingerprint: str) -> bool:
    place = _place()
    return fingerprint in _passed_here or bool(place and (place / fingerprint).exists())


def _note(fingerprint: str) -> None:
    _passed_here.add(fingerprint)
    if place := _place():
        try:
            place.mkdir(parents=True, exist_ok=True)
            (place / fingerprint).touch()
        except OSError:
            logger.info("AlphaQ cannot write to %s: kernels are compared again at the next start", place)


# Layers of one model, where the cache cannot be written.
_passed_here: set[str] = set()


def _place() -> Path | None:
    try:
        return cache_directory() / PASSED
    except ValueError:
        return None
