"""Whether kernels that never ran on a GPU compute what the weights say, before anything is served with them.

A compiler or a chip that nobody has met may compute something else, and what a model says then still looks like words.
So a few tokens go through every tile that serving may choose, and are compared with the weights, dequantized.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from alphaq_vllm.kernels import torch_layer
from alphaq_vllm.kernels.choice import KERNELS, chosen_kernels
from alphaq_vllm.kernels.routing import Routing
from alphaq_vllm.kernels.triton import layer
from alphaq_vllm.kernels.weights import MoEWeights

# Tokens that differ; more are repetitions.
TOKENS = 8
# Of the largest expected value, in units of the dtype's precision. Roundings stay below 3; a wrong weight, scale or
# route is hundreds.
MAX_ERROR = 4


class Sample(NamedTuple):
    """Some tokens of a layer, and what it must make of them.

    x: ``[TOKENS, hidden_size]``. routing: of these tokens, to experts that have every width of the layer. expected:
    ``[TOKENS, hidden_size]`` float32.
    """

    x: torch.Tensor
    routing: Routing
    expected: torch.Tensor

    @classmethod
    def of(cls, weights: MoEWeights, routing: Routing, dtype: torch.dtype) -> Sample:
        """Compute the expected values from weights in the order of the checkpoint.

        routing: ``routing_of``'s. dtype: of the activations that the layer will serve.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(TOKENS, weights.w13.K, generator=generator).to(weights.w13.packed.device, dtype)
        return cls(x, routing, torch_layer.fused_moe(x.float(), weights, routing))


def routing_of(
    weights: MoEWeights, top_k: int, expert_map: torch.Tensor | None, apply_router_weight_on_input: bool
) -> Routing:
    """Routes of ``TOKENS`` tokens to as few experts as have every width, so that little is dequantized."""
    num_bits = torch.cat([weights.w13.num_bits, weights.w2.num_bits], 1).tolist()
    experts: list[int] = []
    for expert, widths in enumerate(num_bits):
        if not {*widths} <= {width for other in experts for width in num_bits[other]} or not experts:
            experts.append(expert)
    device = weights.w13.packed.device
    ids = torch.tensor(experts, device=device)
    if expert_map is not None:
        ids = torch.stack([(expert_map == expert).nonzero()[0, 0] for expert in experts])
    routes = torch.arange(TOKENS * top_k, device=device).view(TOKENS, top_k)
    topk_weights = torch.rand(TOKENS, top_k, generator=torch.Generator().manual_seed(1)).to(device)
    return Routing(topk_weights, ids[routes % len(ids)].to(torch.int32), expert_map, apply_router_weight_on_input)


def check(weights: MoEWeights, sample: Sample) -> None:
    """Compute the sample with every kernel that serving may need, which are compiled for that.

    weights: the sample's, in the order of a GPU.

    Raises ValueError, naming GPU, versions, tile and the way out, if a result is not what is expected.
    """
    x, routing, expected = sample
    bound = MAX_ERROR * torch.finfo(x.dtype).eps * float(expected.abs().max())
    for num_tokens, tiles in layer.every_tile(weights, routing.topk_ids.shape[1], routing.expert_map):
        tokens = torch.arange(num_tokens, device=x.device) % TOKENS
        repeated = Routing(
            routing.topk_weights[tokens],
            routing.topk_ids[tokens],
            routing.expert_map,
            routing.apply_router_weight_on_input,
        )
        out = layer.fused_moe(x[tokens], weights, repeated)
        error = float((out[:TOKENS].float() - expected[:num_tokens]).abs().max())
        # NaN is no number that is small enough. A route's products do not depend on what else is in its tile.
        if not (error <= bound and torch.equal(out, out[:TOKENS][tokens])):
            others = "plain or torch" if chosen_kernels() == "fast" else "torch"
            raise ValueError(
                f"the kernels' check of themselves on {_machine()}, {num_tokens} tokens in {tiles}: expected equal "
                f"results for equal tokens and an error of up to {bound:.3g}, got {error:.3g}: set {KERNELS} to "
                f"{others} (which takes --enforce-eager), and report this message"
            )


def _machine() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "an emulated GPU"
    return f"{gpu}, torch {torch.__version__}, Triton {triton.__version__}, {KERNELS}={chosen_kernels()}"


def fingerprint(weights: MoEWeights, routing: Routing, dtype: torch.dtype) -> str:
    """What the kernels of a layer depend on: the machine, their sources and the layer's sizes, as a file's name."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    total = sha256(b"".join(source.read_bytes() for source in sources))
    w13, w2 = weights.w13, weights.w2
    sizes = [(e.grids.shape, e.group_size, e.widths) for e in (w13, w2)]
    biases = [None if bias is None else bias.dtype for bias in (weights.w13_bias, weights.w2_bias)]
    mapped = None if routing.expert_map is None else len(routing.expert_map)
    router = (routing.topk_ids.shape[1], mapped, routing.apply_router_weight_on_input)
    total.update(repr((_machine(), sizes, biases, weights.gate, router, dtype)).encode())
    return total.hexdigest()
