"""What tells how much a matrix suffers from quantization, on a mature dense model: its feed-forward layers cut into
slices, as if each slice were an expert.

    python -m benchmarks.slices MODEL --text FILE... [--gguf NAME] [--slices 8] [--bits 2] [--maps 2.5,3]

A slice has consecutive neurons: rows of gate and up, columns of down. Each matrix of each slice is quantized alone, by
``--quantizer mse``, and the KL divergence of the model's predictions is measured. Rank correlations (Spearman) say what
else would have told it: over all matrices, and among slices of one layer's same projection alone, averaged, where
neither depth nor kind of matrix plays a part. ``--maps`` gives each matrix a width by these figures, under a budget,
beside as many matrices of each width at random.

MODEL is a directory of a dense model with gate, up and down, whose name has no special rule in transformers; ``--gguf``
names a GGUF file in it, for which transformers wants the packages ``gguf`` and ``accelerate``. One JSON line is printed
and appended to ``benchmarks/results/slices.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from alphaq_vllm.ranks import shared_group_size
from benchmarks.machine import machine
from offline.allocation.knapsack import auto_gamma, importance
from offline.allocation.modes import least_cost, uniform
from offline.quantizers.quantize import quantize
from offline.sensitivity.reach import reaches
from offline.sensitivity.spectra import choose_block_size, hill_alpha

RESULTS = Path(__file__).parent / "results" / "slices.jsonl"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Of a map.
WIDTHS = (2, 3, 4)


@dataclass(frozen=True, eq=False)
class Slice:
    """One matrix of one slice; ``part`` is a view of the layer's own, float32, and ``original`` a copy of it."""

    layer: int
    projection: int
    number: int
    part: Tensor
    original: Tensor

    @property
    def name(self) -> str:
        """As of an expert's matrix."""
        return f"{self.layer}.{self.number}.{PROJECTIONS[self.projection]}"

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.original.numel()

    @cache  # noqa: B019 - it lives as long as the process
    def quantized(self, num_bits: int) -> Tensor:
        """Its weights as they would be restored. Raises ValueError for columns that no group size divides."""
        size = shared_group_size(self.original.shape[1], 64)
        if size is None:
            raise ValueError(f"--slices: expected columns in groups of 32 or more, got {self.original.shape[1]}")
        return quantize(self.original, num_bits, size, "mse").dequantize(num_bits)


class Network:
    """A model on one text: what enters each layer, and what it predicts."""

    def __init__(
        self, path: Path, gguf: str | None, texts: list[str], windows: int, context: int, compared: int
    ) -> None:
        options = {"gguf_file": gguf} if gguf else {}
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()
        self.layers: nn.ModuleList = self.model.get_decoder().layers
        ids = torch.tensor(tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"])
        every = ids[: len(ids) // context * context].view(-1, context)
        chosen = every[torch.linspace(0, len(every) - 1, windows).round().long()]
        if tokenizer.bos_token_id is not None:
            chosen = torch.cat([torch.full_like(chosen[:, :1], tokenizer.bos_token_id), chosen], 1)
        self.tokens = chosen
        # Predictions of a large vocabulary cost more than the layers.
        self.places = torch.linspace(1, chosen[:, :-1].numel() - 1, compared).round().long()
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []
        with self._recorded(), torch.inference_mode():
            self.model(input_ids=chosen[:, :-1], use_cache=False, logits_to_keep=1)
        self.reference = self.predictions(len(self.layers) - 1)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        def record(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden, *rest = arguments or (named.pop("hidden_states"),)
            if rest:
                raise ValueError("MODEL: expected a decoder that passes all but hidden states by name")
            self.calls.append((hidden.clone(), dict(named)))

        hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in self.layers]
        yield
        for hook in hooks:
            hook.remove()

    @torch.inference_mode()
    def after(self, layer: int, hidden: Tensor | None = None) -> Tensor:
        """The layer's output, for what entered it or for other hidden states."""
        entered, named = self.calls[layer]
        out = self.layers[layer](entered if hidden is None else hidden, **named)
        return out[0] if isinstance(out, tuple) else out

    @torch.inference_mode()
    def predictions(self, layer: int, hidden: Tensor | None = None) -> Tensor:
        """Log-probabilities at the compared places, ``[places, vocabulary]``, from a layer on; hidden: its output."""
        hidden = self.after(layer) if hidden is None else hidden
        for later in range(layer + 1, len(self.layers)):
            hidden = self.after(later, hidden)
        hidden = self.model.get_decoder().norm(hidden.flatten(0, 1)[self.places])
        return self.model.get_output_embeddings()(hidden).log_softmax(-1)

    def kl(self, predictions: Tensor) -> float:
        """Mean divergence of predictions from those of the model, in nats."""
        return float((self.reference.exp() * (self.reference - predictions)).sum(-1).double().mean())

    @property
    def perplexity(self) -> float:
        """Of the tokens that came at the compared places."""
        came = self.tokens[:, 1:].flatten()[self.places]
        return float(torch.exp(-self.reference.gather(1, came[:, None]).double().mean()))

    def slices(self, count: int) -> list[Slice]:
        """All matrices of all slices, in the order of layers, numbers and projections."""
        found = []
        for number, layer in enumerate(self.layers):
            weights = [getattr(layer.mlp, name).weight.data for name in PROJECTIONS]
            parts = [
                weight.chunk(count, int(name == "down_proj")) for name, weight in zip(PROJECTIONS, weights, strict=True)
            ]
            found += [
                Slice(
                    number,
                    projection,
                    i,
                    parts[projection][i],
                    parts[projection][i].clone(memory_format=torch.contiguous_format),
                )
                for i in range(count)
                for projection in range(3)
            ]
        return found


def measure(network: Network, matrices: list[Slice], num_bits: int) -> dict[str, np.ndarray]:
    """The KL divergence that each matrix causes alone, what its layer's output says of it, and what its weights do."""
    outputs = {layer: network.after(layer) for layer in range(len(network.layers))}
    kls, propagated = [], []
    for i, matrix in enumerate(matrices):
        matrix.part.copy_(matrix.quantized(num_bits))
        changed = network.after(matrix.layer)
        kls.append(network.kl(network.predictions(matrix.layer, changed)))
        matrix.part.copy_(matrix.original)
        before = outputs[matrix.layer]
        propagated.append(float((changed - before).double().square().sum() / before.double().square().sum()))
        print(f"\r{i + 1} of {len(matrices)}", end="", flush=True)
    print()
    return {"kl": np.array(kls), "propagated error": np.array(propagated), **of_weights(network, matrices, num_bits)}


def of_weights(network: Network, matrices: list[Slice], num_bits: int) -> dict[str, np.ndarray]:
    """What the weights of each matrix say, each figure the larger the more it is thought to suffer."""
    weights = [matrix.original for matrix in matrices]
    errors = np.array([float((m.original - m.quantized(num_bits)).square().mean()) for m in matrices])
    size = choose_block_size(tuple(weight.shape) for weight in weights)
    variance = np.array([float(weight.var(correction=0)) for weight in weights])
    norms = np.array([float(torch.linalg.matrix_norm(weight, 2)) for weight in weights])
    fourth = np.array([float(((w - w.mean()) / w.std(correction=0)).pow(4).mean()) for w in weights])
    numel = np.array([weight.numel() for weight in weights])
    activation = network.layers[0].mlp.act_fn
    reach = [reaches([m.original for m in matrices[i : i + 3]], activation) for i in range(0, len(matrices), 3)]
    return {
        # The theory: the smaller alpha, the better trained and the more sensitive.
        "small alpha": -np.array([hill_alpha(weight, size) for weight in weights]),
        "kurtosis": fourth,
        "stable rank": variance * numel / norms**2,
        "squared error": errors,
        "relative error": errors / variance,
        "expert": errors * np.array(reach).flatten(),
    }


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """The rank correlation of two rows of figures without ties."""
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def correlations(matrices: list[Slice], figures: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """By figure, its rank correlation with the KL divergence: over all, by projection, and among a layer's slices."""
    kl = figures["kl"]
    projections = np.array([matrix.projection for matrix in matrices])
    groups: dict[tuple[int, int], list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault((matrix.layer, matrix.projection), []).append(i)
    found = {}
    for name, values in figures.items():
        if name == "kl":
            continue
        row = {"all": spearman(values, kl)}
        for place, projection in enumerate(PROJECTIONS):
            row[projection] = spearman(values[projections == place], kl[projections == place])
        within = [spearman(values[some], kl[some]) for some in groups.values() if len(some) > 2]
        if within:
            row["within"], row["within_error"] = float(np.mean(within)), float(np.std(within) / len(within) ** 0.5)
        found[name] = row
    return found


def maps(
    network: Network, matrices: list[Slice], figures: dict[str, np.ndarray], num_bits: int, bits: float
) -> dict[str, Any]:
    """The KL divergence of maps of widths at a budget, and of the same widths shuffled; num_bits: of the figures."""
    errors = np.array([[float((m.original - m.quantized(b)).square().mean()) for b in WIDTHS] for m in matrices])
    numel = np.array([matrix.numel for matrix in matrices])
    variance = np.array([float(matrix.original.var(correction=0)) for matrix in matrices])
    alphas = -figures["small alpha"]
    measured = errors[:, WIDTHS.index(num_bits)]
    sensitivities: dict[str, np.ndarray] = {
        "alpha": importance(alphas, auto_gamma(alphas)),
        "squared error": np.ones(len(matrices)),
        "relative error": 1 / variance,
        "expert": figures["expert"] / measured / numel,
        "propagated error": figures["propagated error"] / measured / numel,
    }

    def score(widths: list[int]) -> float:
        for matrix, width in zip(matrices, widths, strict=True):
            matrix.part.copy_(matrix.quantized(width))
        kl = network.kl(network.predictions(0))
        for matrix in matrices:
            matrix.part.copy_(matrix.original)
        return kl

    found: dict[str, Any] = {}
    found["uniform"] = {"kl": score(uniform(matrices, WIDTHS, bits).tolist())}
    for name, sensitivity in sensitivities.items():
        costs = (sensitivity * numel)[:, None] * errors
        widths = least_cost(matrices, costs, WIDTHS, bits, "projection")[0].tolist()
        controls = [score(random.Random(seed).sample(widths, len(widths))) for seed in range(3)]
        found[name] = {"kl": score(widths), "control_kl": controls, "widths": {w: widths.count(w) for w in WIDTHS}}
        print(f"{bits:g} bits  {name:20} {found[name]['kl']:.4f}  at random {np.mean(controls):.4f}", flush=True)
    return found


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a directory with a dense model")
    parser.add_argument("--gguf", metavar="NAME", help="a GGUF file in it")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--slices", type=int, default=8, help="of each layer (default 8)")
    parser.add_argument(
        "--bits", type=int, default=2, choices=WIDTHS, help="of a matrix that is quantized alone (default 2)"
    )
    parser.add_argument("--maps", default="2.5,3", help="budgets of maps (default 2.5,3)")
    parser.add_argument("--windows", type=int, default=4, help="of the text (default 4)")
    parser.add_argument("--context", type=int, default=256, help="tokens in a window (default 256)")
    parser.add_argument("--compared", type=int, default=256, help="predictions, spread over the text (default 256)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="where the line is appended")
    return parser


def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    texts = [file.read_text() for file in args.text]
    network = Network(args.model, args.gguf, texts, args.windows, args.context, args.compared)
    print(f"perplexity {network.perplexity:.2f} at {args.compared} places")
    matrices = network.slices(args.slices)
    figures = measure(network, matrices, args.bits)
    found = correlations(matrices, figures)
    for name, row in found.items():
        print(f"{name:20}", "  ".join(f"{key} {value:+.2f}" for key, value in row.items()))
    line = {
        "model": args.gguf or args.model.name,
        "slices": args.slices,
        "bits": args.bits,
        "tokens": network.tokens[:, :-1].numel(),
        "compared": args.compared,
        "perplexity": network.perplexity,
        "kl": [float(value) for value in np.quantile(figures["kl"], [0, 0.25, 0.5, 0.75, 1])],
        "correlations": found,
        "maps": {bits: maps(network, matrices, figures, args.bits, float(bits)) for bits in args.maps.split(",")},
        **machine(),
    }
    print(json.dumps(line))
    with args.results.open("a") as file:
        print(json.dumps(line), file=file)


if __name__ == "__main__":
    main()
