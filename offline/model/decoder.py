"""Running a model one layer at a time: its skeleton by transformers, without weights; a layer's weights when needed.

The weights of routed experts are never loaded here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

from offline.model.handed import nbytes, num_returned
from offline.model.layer import Layer, advance, recorder, route
from offline.model.runnable import (
    computed_buffers,
    experts_module,
    last_norm,
    latent_projection,
    place_buffers,
    text_decoder,
    why_not,
)
from offline.model.sampling import draw
from offline.model.skeleton import by_transformers, skeleton, stored_names, stored_rows, tensors_beside_experts
from offline.source.checkpoint import Checkpoint
from offline.source.families import Experts
from offline.source.recognition import family_of

# How norms call what they add to a variance before they divide by its root.
_EPSILONS = ("variance_epsilon", "eps")


class Decoder:
    """The decoder of a checkpoint that has all tensors of its model, without weights.

    ``hands_on``: whether its layers may return more than hidden states for the next.
    Raises ValueError for a family that cannot be run layer by layer.
    """

    def __init__(self, source: Checkpoint, experts: Experts) -> None:
        if reason := why_not(source):
            raise ValueError(
                f"{source.path}: `quantizer=gptq` and `noise=propagated` run the model, which cannot be done with "
                f"{experts.model_type}: {reason}: leave both out"
            )
        model, family = skeleton(source), family_of(source)
        self._decoder = text_decoder(model)
        buffers = computed_buffers(self._decoder)
        self._buffers = {name: buffer for name, buffer in buffers.items() if not name.startswith("layers.")}
        beside = tensors_beside_experts(model)
        stored, _ = stored_names(model, family, beside)
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
        self._num_returned = num_returned(self._decoder)
        self.hands_on = self._num_returned > 1
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.context: int = config.max_position_embeddings
        below = f"{names[self._decoder.layers]}."
        in_layers = stored_rows(model, family, {key: part for key, part in beside.items() if key.startswith(below)})
        self.layers = []
        for number, module in enumerate(self._decoder.layers):
            prefix, name = f"{names[module]}.", f"{family.block_of(number)}.experts"
            tensors = {key.removeprefix(prefix): rows for key, rows in in_layers.items() if key.startswith(prefix)}
            own = f"layers.{number}."
            kept = {key.removeprefix(own): buffer for key, buffer in buffers.items() if key.startswith(own)}
            routed = experts_module(module) if name in experts.modules else None
            back = latent_projection(module) if routed else None
            self.layers.append(Layer(module, tensors, routed, name if routed else None, back, kept))
        for layer, following in pairwise(self.layers):
            layer.following = following

    def layer_bytes(self, source: Checkpoint) -> int:
        """Bytes of the largest layer in float32, without its experts."""
        names = ([name for rows in layer.tensors.values() for name in rows] for layer in self.layers)
        return max(sum(math.prod(source.spec(name).shape) for name in some) for some in names) * torch.float32.itemsize

    def head_bytes(self, source: Checkpoint) -> int:
        """Bytes of what predicts tokens, as it is stored."""
        return source.spec(self._head).nbytes

    @torch.no_grad()
    def rehearse(self, source: Checkpoint, length: int = 1) -> int:
        """Take a window of so many tokens through the model without weights, to see that its config lets it run.

        Returns the most bytes that a layer hands on for it besides hidden states.
        Raises ValueError for a config with which transformers fails, or computes no numbers.
        """
        if self.context < 1:
            raise ValueError(
                f"{source.path}: config.json: max_position_embeddings: expected a number of tokens from 1 up, "
                f"got {self.context}: correct it or download it again"
            )
        numbers = (vars(module).get(name) for module in self._decoder.modules() for name in _EPSILONS)
        if wrong := [number for number in numbers if isinstance(number, float) and not 0 <= number < torch.inf]:
            raise ValueError(
                f"{source.path}: config.json: expected an epsilon of norms from 0 up, got {wrong[0]}: "
                "correct it or download it again"
            )
        with by_transformers(source, "run"):
            hidden, handed_nbytes = torch.zeros(1, length, self.hidden_size), 0
            self._enter(hidden)
            computed = [hidden / self._logits_scaling, *tree_iter([layer.arguments for layer in self.layers])]
            hidden = hidden.to("meta")
            for layer in self.layers:
                layer.arguments = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), layer.arguments)
                if layer.experts is None:
                    advance(layer, hidden)
                else:
                    route(layer, hidden)
                handed_nbytes = max(handed_nbytes, *(nbytes(handed) for handed in layer.handed.values()), 0)
        if any(bool(part.isnan().any()) for part in computed if isinstance(part, Tensor)):
            raise ValueError(
                f"{source.path}: config.json: expected positions and factors that transformers can compute with, "
                "got some that give NaN: correct it or download it again"
            )
        return handed_nbytes

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
        for number, layer in enumerate(self.layers):
            layer.module.forward = recorder(layer, number, self._num_returned)  # type: ignore[method-assign]
        setattr(self._decoder, self._norm_name, nn.Identity())
        place_buffers(self._decoder, self._buffers, hidden.device)
        for window in hidden:
            # Some families scale what comes out of the table.
            window.copy_(self._decoder(inputs_embeds=window[None], use_cache=False).last_hidden_state[0])
        for layer in self.layers:
            del layer.module.forward

    @torch.no_grad()
    def sample(
        self,
        source: Checkpoint,
        hidden: Tensor,
        shares: Tensor,
        workers: int = 1,
        known: Tensor | None = None,
        record: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Tokens that the model predicts after every place, ``[windows, length, draws]``, from the last layer's output.

        shares: random, of the same shape; workers, known, record: see ``draw``.
        Raises ValueError for predictions that are not finite.
        """
        device = hidden.device
        norm = {key: source.load(name).to(device, torch.float32) for key, name in self._norm_tensors.items()}
        self._norm.load_state_dict(norm, assign=True)
        head = source.load(self._head).to(device)
        bias = source.load(self._head_bias).to(device) if self._head_bias else None
        places = self._norm(hidden).flatten(0, 1)
        drawn_by = shares.flatten(0, 1).to(device)
        tokens = draw(places, drawn_by, head, bias, self._logits_scaling, workers, self._softcap, known, record)
        return tokens.view(shares.shape).cpu()
