"""Running a model one layer at a time: its skeleton by transformers, without weights; a layer's weights when needed.

The weights of routed experts are never loaded here. A layer runs once, for what reaches its experts and for its output
without theirs, which every family adds to the rest of the layer's output: so that somebody else can do it later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

from offline.model.sampling import draw
from offline.model.skeleton import ROUTERS, by_transformers, skeleton
from offline.source.checkpoint import Checkpoint
from offline.source.families import Experts
from offline.threads import in_threads

# Families whose experts compute ``down(act_fn(gate(x)) * up(x))``, called with inputs, ids and weights of experts.
CALIBRATED = (
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "olmoe", "deepseek_v2", "deepseek_v3",
    "glm4_moe", "minimax_m2", "granitemoe", "granitemoeshared", "phimoe",
)  # fmt: skip


def can_run(experts: Experts) -> bool:
    """Whether ``Decoder`` knows the family."""
    return experts.model_type in CALIBRATED


@dataclass(frozen=True)
class Routes:
    """What reaches the experts of a layer: ``inputs`` ``[tokens, hidden_size]``, ``topk_ids`` and ``topk_weights``
    ``[tokens, k]``.
    """

    inputs: Tensor
    topk_ids: Tensor
    topk_weights: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens of one expert, int64, and their weights, float32."""
        tokens, slots = torch.where(self.topk_ids == expert)
        return tokens, self.topk_weights[tokens, slots].float()


@dataclass
class Layer:
    """A decoder layer.

    tensors: the source's tensor for each parameter and buffer of the module but its experts'; experts: the module of
    routed experts and source_experts its name in the source, if it has one; arguments: what it is called with besides
    its input.
    """

    module: nn.Module
    tensors: Mapping[str, str]
    experts: nn.Module | None
    source_experts: str | None
    arguments: tuple[Sequence[Any], Mapping[str, Any]] = ((), {})

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """What is applied to the output of gate."""
        from transformers.activations import SiLUActivation

        function = self.experts.act_fn  # type: ignore[union-attr]
        # Torch's own function reaches another process without an import of transformers there.
        return nn.functional.silu if isinstance(function, SiLUActivation) else function  # type: ignore[return-value]

    @contextmanager
    def loaded(self, source: Checkpoint, device: torch.device) -> Iterator[None]:
        """Have the weights in memory, in float32."""
        weights = {key: source.load(name).to(device, torch.float32) for key, name in self.tensors.items()}
        self.module.load_state_dict(weights, strict=False, assign=True)
        del weights
        try:
            yield
        finally:
            self.module.to("meta")


class Decoder:
    """The decoder of a checkpoint that has all tensors of its model, without weights.

    Raises ValueError for a family that cannot be run layer by layer.
    """

    def __init__(self, source: Checkpoint, experts: Experts) -> None:
        if not can_run(experts):
            raise ValueError(
                f"{source.path}: `quantizer=gptq` and `noise=propagated` can run {', '.join(CALIBRATED)}, "
                f"got {experts.model_type}: use `quantizer=mse` and `noise=measured`"
            )
        model = skeleton(source)
        self._decoder = model.get_decoder()
        # Its frequencies are computed, not loaded.
        self._decoder.rotary_emb = type(self._decoder.rotary_emb)(config=self._decoder.config)
        names = {module: name for name, module in model.named_modules()}
        embedding = f"{names[self._decoder.get_input_embeddings()]}.weight"
        norm, head = self._decoder.norm, model.get_output_embeddings()
        self._norm, self._norm_tensors = norm, {key: f"{names[norm]}.{key}" for key in norm.state_dict()}
        # A model that ties the two may have either.
        self._embedding = embedding if embedding in source.tensors else f"{names[head]}.weight"
        self._head = f"{names[head]}.weight" if f"{names[head]}.weight" in source.tensors else embedding
        self._head_bias = f"{names[head]}.bias" if f"{names[head]}.bias" in source.tensors else None
        # What Granite divides its predictions by.
        self._logits_scaling = getattr(self._decoder.config, "logits_scaling", 1.0)
        self.vocab_size: int = self._decoder.config.vocab_size
        self.context: int = self._decoder.config.max_position_embeddings
        self.layers = [_layer(module, f"{names[module]}.", experts) for module in self._decoder.layers]

    @torch.no_grad()
    def rehearse(self, source: Checkpoint) -> None:
        """Take a token through the model without weights, to see that its config lets it run.

        Raises ValueError for a config with which transformers fails, or computes no numbers.
        """
        if self.context < 1:
            raise ValueError(
                f"{source.path}: config.json: max_position_embeddings: expected a number of tokens from 1 up, "
                f"got {self.context}: correct it or download it again"
            )
        with by_transformers(source, "run"):
            hidden = torch.zeros(1, 1, self._decoder.config.hidden_size)
            self._enter(hidden)
            computed = [hidden / self._logits_scaling, *tree_iter([layer.arguments for layer in self.layers])]
            hidden = hidden.to("meta")
            for layer in self.layers:
                layer.arguments = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), layer.arguments)
                if layer.experts is None:
                    advance(layer, hidden)
                else:
                    add_outputs(layer, hidden, route(layer, hidden).inputs)
        if any(bool(part.isnan().any()) for part in computed if isinstance(part, Tensor)):
            raise ValueError(
                f"{source.path}: config.json: expected positions and factors that transformers can compute with, "
                "got some that give NaN: correct it or download it again"
            )

    @torch.no_grad()
    def embed(self, source: Checkpoint, windows: Tensor, device: torch.device) -> Tensor:
        """The input of the first layer, ``[windows, length, hidden_size]`` float32, for token ids ``windows``.

        Learns what else the layers are called with, which depends on the length of the windows alone.
        """
        hidden = nn.functional.embedding(windows, source.load(self._embedding)).to(device, torch.float32)
        self._enter(hidden)
        return hidden

    def _enter(self, hidden: Tensor) -> None:
        """Replace rows of the embedding table, ``[windows, length, hidden_size]``, by the input of the first layer."""
        for layer in self.layers:
            layer.module.forward = _recorder(layer)  # type: ignore[method-assign]
        self._decoder.norm = nn.Identity()
        self._decoder.rotary_emb.to(hidden.device)
        for window in hidden:
            # Some families scale what comes out of the table.
            window.copy_(self._decoder(inputs_embeds=window[None], use_cache=False).last_hidden_state[0])
        for layer in self.layers:
            del layer.module.forward

    @torch.no_grad()
    def sample(self, source: Checkpoint, hidden: Tensor, shares: Tensor, workers: int = 1) -> Tensor:
        """Tokens that the model predicts after every place, ``[windows, length, draws]``, from the last layer's output.

        shares: random, of the same shape, and workers: see ``draw``.
        Raises ValueError for predictions that are not finite.
        """
        device = hidden.device
        norm = {key: source.load(name).to(device, torch.float32) for key, name in self._norm_tensors.items()}
        self._norm.load_state_dict(norm, assign=True)
        head = source.load(self._head).to(device)
        bias = source.load(self._head_bias).to(device) if self._head_bias else None
        places = self._norm(hidden).flatten(0, 1)
        try:
            tokens = draw(places, shares.flatten(0, 1).to(device), head, bias, self._logits_scaling, workers)
        except FloatingPointError:
            raise ValueError(
                f"{source.path}: expected a model that predicts tokens, got NaN from its last layer: compare its "
                "files and config.json with the original"
            ) from None
        return tokens.view(shares.shape).cpu()


@torch.no_grad()
def route(layer: Layer, hidden: Tensor, workers: int = 1) -> Routes:
    """What reaches the experts of a loaded layer with the input ``hidden``, ``[windows, length, hidden_size]``.

    ``hidden`` becomes the layer's output but for what ``add_outputs`` adds. workers: threads to use, which changes no
    number.
    """
    seen, inputs = threading.local(), torch.empty_like(hidden)

    def record(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        seen.inputs, seen.topk = hidden_states, (top_k_index, top_k_weights)
        return torch.zeros_like(hidden_states)

    def run(number: int) -> tuple[Tensor, Tensor]:
        hidden[number] = _call(layer, hidden[number])
        inputs[number] = seen.inputs.view_as(inputs[number])
        return seen.topk

    layer.experts.forward = record  # type: ignore[union-attr, method-assign]
    topk = zip(*in_threads(run, range(len(hidden)), workers), strict=True)
    return Routes(inputs.flatten(0, 1), *(torch.cat(tensors) for tensors in topk))


def add_outputs(layer: Layer, hidden: Tensor, expert_outputs: Tensor) -> None:
    """Add what comes out of a layer's experts, ``[tokens, hidden_size]``, to what ``route`` has left of ``hidden``."""
    # Granite scales it.
    hidden.flatten(0, 1).add_(expert_outputs, alpha=getattr(layer.module, "residual_multiplier", 1))


@torch.no_grad()
def advance(layer: Layer, hidden: Tensor, workers: int = 1) -> None:
    """Replace ``hidden``, the input of a loaded layer without experts, by its output; workers: as of ``route``."""

    def run(window: Tensor) -> None:
        window.copy_(_call(layer, window))

    for _ in in_threads(run, hidden, workers):
        pass


def _call(layer: Layer, window: Tensor) -> Tensor:
    positional, named = layer.arguments
    return layer.module(window[None], *positional, **named)[0]


def _recorder(layer: Layer) -> Callable[..., Tensor]:
    def record(hidden_states: Tensor, *positional: Any, **named: Any) -> Tensor:
        layer.arguments = positional, named
        return hidden_states

    return record


def _layer(module: nn.Module, prefix: str, experts: Experts) -> Layer:
    """prefix: the name of the layer, which model and source share, with a dot."""
    source_experts = next((name for name in experts.modules if name.startswith(prefix)), None)
    keys = list(module.state_dict())
    if source_experts is None:
        return Layer(module, {key: prefix + key for key in keys}, None, None)
    name = next(name for name, _ in module.named_modules() if name.split(".")[-1] == "experts")
    block, source_block = name.removesuffix("experts"), source_experts.removeprefix(prefix).removesuffix("experts")
    renamed = {f"{block}router.weight": block + ROUTERS.get(experts.model_type, "router.weight")}
    tensors = {}
    for key in keys:
        if not key.startswith(f"{name}."):
            source_key = renamed.get(key, key)
            below = source_key.removeprefix(block)
            tensors[key] = prefix + (source_key if below == source_key else source_block + below)
    return Layer(module, tensors, module.get_submodule(name), source_experts)
