"""Running a model one layer at a time: its skeleton by transformers, without weights; a layer's weights when needed.

The weights of routed experts are never loaded here. A layer runs once, for what reaches its experts and for its output
without theirs, which most families add to the rest of the layer's output: so that somebody else can do it later. Where
a layer does more with what comes out of its experts, such as to normalize it, it runs twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

from offline.model.runnable import computed_buffers, experts_module, last_norm, why_not
from offline.model.sampling import draw
from offline.model.skeleton import by_transformers, skeleton, stored_names, tensors_beside_experts
from offline.source.checkpoint import Checkpoint
from offline.source.families import Experts
from offline.source.recognition import family_of
from offline.threads import in_threads

# How far the output of a layer may be from its experts' output times a number, added to the rest.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Routes:
    """What reaches the experts of a layer: ``inputs`` ``[tokens, hidden_size]``, ``topk_ids`` and ``topk_weights``
    ``[tokens, k]``. before: the input of the layer, if it has to run again.
    """

    inputs: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    before: Tensor | None = None

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens of one expert, int64, and their weights, float32."""
        tokens, slots = torch.where(self.topk_ids == expert)
        return tokens, self.topk_weights[tokens, slots].float()


@dataclass
class Layer:
    """A decoder layer.

    tensors: the source's tensor for each parameter and buffer of the module but its experts'; experts: the module of
    routed experts and source_experts its name in the source, if it has one; buffers: what no checkpoint has of it;
    arguments: what it is called with besides its input; scale: what the output of the experts is multiplied by before
    it is added to the rest, None if that is not all that happens to it, and unknown before the layer runs.
    """

    module: nn.Module
    tensors: Mapping[str, str]
    experts: nn.Module | None
    source_experts: str | None
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    arguments: tuple[Sequence[Any], Mapping[str, Any]] = ((), {})
    scale: float | None = None
    probed: bool = False

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
        for name, buffer in self.buffers.items():
            parent, _, leaf = name.rpartition(".")
            self.module.get_submodule(parent)._buffers[leaf] = buffer.to(device)
        try:
            yield
        finally:
            self.module.to("meta")


class Decoder:
    """The decoder of a checkpoint that has all tensors of its model, without weights.

    Raises ValueError for a family that cannot be run layer by layer.
    """

    def __init__(self, source: Checkpoint, experts: Experts) -> None:
        if reason := why_not(source):
            raise ValueError(
                f"{source.path}: `quantizer=gptq` and `noise=propagated` run the model, which cannot be done with "
                f"{experts.model_type}: {reason}: use `quantizer=mse` and `noise=measured`"
            )
        model, family = skeleton(source), family_of(source)
        self._decoder = model.get_decoder()
        buffers = computed_buffers(self._decoder)
        stored, _ = stored_names(model, family, tensors_beside_experts(model))
        names = {module: name for name, module in model.named_modules()}
        table, head = self._decoder.get_input_embeddings(), model.get_output_embeddings()
        embedding, prediction = stored[f"{names[table]}.weight"], stored[f"{names[head]}.weight"]
        # A model that ties the two may have either.
        self._embedding = embedding if embedding in source.tensors else prediction
        self._head = prediction if prediction in source.tensors else embedding
        bias = stored.get(f"{names[head]}.bias")
        self._head_bias = bias if bias in source.tensors else None
        self._norm_name, self._norm = last_norm(self._decoder)
        self._norm_tensors = {key: stored[f"{names[self._norm]}.{key}"] for key in self._norm.state_dict()}
        config = self._decoder.config
        # Gemma multiplies what comes out of its table, within the table's module.
        self._embedding_scale = float(getattr(table, "scalar_embed_scale", 1.0))
        # What Granite divides its predictions by, Cohere multiplies them by, and Gemma bends them to.
        self._logits_scaling = getattr(config, "logits_scaling", 1.0) / (getattr(config, "logit_scale", None) or 1.0)
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self.vocab_size: int = config.vocab_size
        self.context: int = config.max_position_embeddings
        self.layers = []
        for number, module in enumerate(self._decoder.layers):
            prefix, name = f"{names[module]}.", f"{family.block_of(number)}.experts"
            tensors = {key.removeprefix(prefix): n for key, n in stored.items() if key.startswith(prefix)}
            own = f"{names[module].removeprefix(names[self._decoder])}.".removeprefix(".")
            kept = {key.removeprefix(own): buffer for key, buffer in buffers.items() if key.startswith(own)}
            routed = experts_module(module) if name in experts.modules else None
            self.layers.append(Layer(module, tensors, routed, name if routed else None, kept))

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
                    route(layer, hidden)
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
        hidden *= self._embedding_scale
        self._enter(hidden)
        return hidden

    def _enter(self, hidden: Tensor) -> None:
        """Replace rows of the embedding table, ``[windows, length, hidden_size]``, by the input of the first layer."""
        for layer in self.layers:
            layer.module.forward = _recorder(layer)  # type: ignore[method-assign]
        setattr(self._decoder, self._norm_name, nn.Identity())
        for name, module in self._decoder.named_children():
            if name != "layers":
                for buffer, tensor in module.named_buffers():
                    if not tensor.is_meta:
                        module.get_submodule(buffer.rpartition(".")[0])._buffers[buffer.rpartition(".")[2]] = tensor.to(
                            hidden.device
                        )
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
            tokens = draw(
                places, shares.flatten(0, 1).to(device), head, bias, self._logits_scaling, workers, self._softcap
            )
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
    if not layer.probed and not hidden.is_meta:
        layer.scale, layer.probed = _scale(layer, hidden[0]), True
    before = hidden.clone() if layer.probed and layer.scale is None else None

    def record(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        seen.inputs, seen.topk = hidden_states, (top_k_index, top_k_weights)
        return torch.zeros_like(hidden_states)

    def run(number: int) -> tuple[Tensor, Tensor]:
        hidden[number] = _call(layer, hidden[number])
        inputs[number] = seen.inputs.view_as(inputs[number])
        return seen.topk

    layer.experts.forward = record  # type: ignore[union-attr, method-assign]
    topk = zip(*in_threads(run, range(len(hidden)), workers), strict=True)
    return Routes(inputs.flatten(0, 1), *(torch.cat(tensors) for tensors in topk), before)


def _scale(layer: Layer, window: Tensor) -> float | None:
    """What a layer multiplies the output of its experts by before it adds it to the rest, if that is all that it does.

    It is found by adding noise to that output.
    """
    outputs = torch.zeros_like(window)
    layer.experts.forward = lambda hidden_states, *_: outputs.view_as(hidden_states)  # type: ignore[union-attr]
    without = _call(layer, window).view_as(window)
    noise = torch.randn(window.shape, generator=torch.Generator().manual_seed(0)).to(window.device)
    outputs = noise * without.square().mean().sqrt()
    change = (_call(layer, window).view_as(window) - without).double()
    scale = float((change * outputs).sum() / outputs.double().square().sum())
    # Multipliers have few digits, and rounding blurs the last ones.
    scale = float(f"{scale:.6g}")
    return scale if float((change - scale * outputs).norm()) < _ROUNDING * float(change.norm()) else None


@torch.no_grad()
def add_outputs(
    layer: Layer, hidden: Tensor, expert_outputs: Tensor, routes: Routes, source: Checkpoint, workers: int = 1
) -> None:
    """Add what comes out of a layer's experts, ``[tokens, hidden_size]``, to what ``route`` has left of ``hidden``.

    routes: what ``route`` returned; source: where the layer is loaded from if it has to run again; workers: threads to
    use, which changes no number.
    """
    if routes.before is None:
        hidden.flatten(0, 1).add_(expert_outputs, alpha=layer.scale)  # type: ignore[arg-type]
        return
    before, outputs, part = routes.before, expert_outputs.view_as(hidden), threading.local()

    def run(number: int) -> None:
        part.outputs = outputs[number]
        hidden[number] = _call(layer, before[number])

    with layer.loaded(source, hidden.device):
        layer.experts.forward = lambda states, *_: part.outputs.view_as(states)  # type: ignore[union-attr]
        for _ in in_threads(run, range(len(hidden)), workers):
            pass


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
