"""What the converter does not offer, on the scale of ``benchmarks.quality``: other grids, other ways to store them, and
other ideas of which matrices are sensitive, all from weights alone.

    python -m benchmarks.ablations MODEL --text FILE... [--only grids,storage,sensitivity]

Every row runs MODEL in transformers with its experts replaced by what would be restored from them, and is appended to
``benchmarks/results/quality.jsonl`` beside those of the converter. Checkpoints with one tensor for each matrix only.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from alphaq_vllm.format import stored_bits_per_weight
from benchmarks.alternatives import (
    GROUP_SIZE,
    alternating_grid,
    balanced,
    coarse,
    column_scales,
    fine,
    restored,
    restored_from,
    rotated,
    symmetric,
)
from benchmarks.quality import RESULTS, Bench, Variant, record
from offline.allocation.knapsack import allocate, auto_gamma, importance
from offline.model.formula import Formula
from offline.quantizers.grids import GRIDS
from offline.sensitivity.propagation import expert_gains
from offline.sensitivity.spectra import choose_block_size, hill_alpha
from offline.source.checkpoint import Checkpoint
from offline.source.families import Experts, load_weight

WIDTHS = (2, 3, 4)
# Made-up inputs of each layer for the sensitivities from weights alone, and what an expert that none reaches counts.
TOKENS, FLOOR = 2048, 0.01
# Scale and zero point in bits, and the group size.
STORAGE = ((8, 8, 128), (6, 4, 128), (4, 4, 128), (8, 8, 64), (6, 4, 64), (4, 4, 64))


class Matrices:
    """The expert matrices of a model, by name, float32."""

    def __init__(self, source: Checkpoint, experts: Experts) -> None:
        self.source = source
        self.experts = experts.matrices
        self.weights = {matrix.name: load_weight(source, matrix) for matrix in experts.matrices}

    @property
    def columns(self) -> int:
        """Of the first matrix: inputs of the layer."""
        return next(iter(self.weights.values())).shape[1]

    def stored_bits(self, bits: float) -> float:
        """Of a weight, as the format stores it, with its share of the scale of its row."""
        return stored_bits_per_weight(bits, GROUP_SIZE) + 16 / self.columns

    @cached_property
    def mse(self) -> np.ndarray:
        """The error of the converter's default quantizer, ``[matrices, widths]``."""
        pairs = [[(w - restored(w, b, GRIDS["mse"])).square().mean() for b in WIDTHS] for w in self.weights.values()]
        return np.array(pairs, np.float64)

    def each(self, restore: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Every matrix as restored."""
        return {name: restore(weight) for name, weight in self.weights.items()}

    def balanced(self, restore: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Every matrix as restored from evened out columns."""
        result: dict[str, Tensor] = {}
        for module in dict.fromkeys(matrix.module for matrix in self.experts):
            by_expert: dict[int, dict[str, Tensor]] = {}
            for matrix in self.experts:
                if matrix.module == module:
                    by_expert.setdefault(matrix.expert, {})[matrix.name] = self.weights[matrix.name]
            inputs = [weight for expert in by_expert.values() for weight in list(expert.values())[:2]]
            shared = column_scales(inputs)
            for expert in by_expert.values():
                result |= balanced(expert, shared, restore)
        return result

    def allocated(self, sensitivity: np.ndarray, average_bits: float) -> dict[str, Tensor]:
        """Every matrix at the width that makes the sum of sensitivity times error least; sensitivity: per weight."""
        numel = np.array([weight.numel() for weight in self.weights.values()])
        bits = allocate((sensitivity * numel)[:, None] * self.mse, numel, WIDTHS, average_bits).bits
        return {
            name: restored(weight, int(width), GRIDS["mse"])
            for (name, weight), width in zip(self.weights.items(), bits, strict=True)
        }

    def values(self, measure: Callable[[Tensor], float]) -> np.ndarray:
        """A number for every matrix."""
        return np.array([float(measure(weight)) for weight in self.weights.values()])

    def by_alpha(self, block_size: int, tail_fraction: float) -> np.ndarray:
        """The paper's importance, at the gamma of ``--gamma auto``."""
        alphas = self.values(partial(hill_alpha, block_size=block_size, tail_fraction=tail_fraction))
        return importance(alphas, auto_gamma(alphas))

    @torch.no_grad()
    def made_up(self, router: bool) -> np.ndarray:
        """The error that each matrix causes at the output of its expert for Gaussian inputs, scaled as the norm before
        the layer scales them, relative to the layer's mean; router: sent to experts as the router's weights say.
        """
        generator = torch.Generator().manual_seed(0)
        gains: dict[str, float] = {}
        top_k = self.source.config["num_experts_per_tok"]
        for module in dict.fromkeys(matrix.module for matrix in self.experts):
            layer, block = module.rsplit(".", 2)[0], module.rpartition(".")[0]
            scale = self.source.load(f"{layer}.post_attention_layernorm.weight").float()
            inputs = torch.randn(TOKENS, len(scale), generator=generator) * scale
            shares = (inputs @ self.source.load(f"{block}.gate.weight").float().T).softmax(-1)
            weights, ids = shares.topk(top_k, -1)
            found: dict[str, float] = {}
            for number in range(shares.shape[1]):
                expert = [m for m in self.experts if m.module == module and m.expert == number]
                tokens, slots = torch.where(ids == number)
                seen, weight = (inputs[tokens], weights[tokens, slots]) if router else (inputs, torch.ones(TOKENS))
                formula = Formula(torch.nn.functional.silu)
                errors = expert_gains(self.source, expert, seen, weight, formula, GROUP_SIZE)
                found |= {matrix.name: error for matrix, error in zip(expert, errors, strict=True)}
            mean = sum(found.values()) / len(found)
            gains |= {name: max(gain / mean, FLOOR) for name, gain in found.items()}
        return np.array([gains[name] / weight.numel() for name, weight in self.weights.items()])


Restored = tuple[str, float, Callable[[], dict[str, Tensor]]]


def grids(matrices: Matrices) -> Iterator[Restored]:
    """Other ways to find a grid or to shape what it must cover, all stored as the format stores them."""
    mse = GRIDS["mse"]
    for bits in WIDTHS:
        restore = partial(restored, num_bits=bits, find_grid=mse)
        alternating = partial(restored, num_bits=bits, find_grid=alternating_grid)
        stored = matrices.stored_bits(bits)
        yield "alternating least squares", stored, partial(matrices.each, alternating)
        yield "mse, columns evened out", stored, partial(matrices.balanced, restore)
        yield "mse, rotated", stored, partial(matrices.each, partial(rotated, restore=restore))


def storage(matrices: Matrices) -> Iterator[Restored]:
    """What a scale and a zero point may cost; a row's own scale is 16 bits more."""
    for bits in WIDTHS:
        for size in (64, 128):
            kinds = {"16-bit scale, no zero": (symmetric, 16 / size), "16-bit scale and zero": (fine, 32 / size)}
            for scale_bits, zero_bits, of_size in STORAGE:
                if of_size == size:
                    each = (scale_bits + zero_bits) / size + 16 / matrices.columns
                    kinds[f"{scale_bits}-bit scale, {zero_bits}-bit zero"] = (coarse(scale_bits, zero_bits), each)
            for name, (stored, overhead) in kinds.items():
                restore = partial(restored_from, num_bits=bits, stored=stored, group_size=size)
                yield f"{name}, groups of {size}", bits + overhead, partial(matrices.each, restore)


def sensitivity(matrices: Matrices) -> Iterator[Restored]:
    """What an error in a matrix is held to matter, at two budgets."""
    variance = matrices.values(lambda weight: float(weight.var(correction=0)))
    stable_rank = matrices.values(lambda w: float(w.square().sum() / torch.linalg.matrix_norm(w, 2).square()))
    kinds = {
        "all alike, relative error": 1 / variance,
        "by stable rank, relative error": stable_rank / variance,
        "by stable rank inverted, relative error": 1 / stable_rank / variance,
        "through the expert, made-up inputs": matrices.made_up(router=False),
        "through router and expert, made-up inputs": matrices.made_up(router=True),
    }
    block_size = choose_block_size(weight.shape for weight in matrices.weights.values())
    for size in (block_size, block_size // 2):
        for tail in (0.05, 0.1, 0.2, 0.4):
            kinds[f"by alpha, blocks of {size}, tail {tail:g}"] = matrices.by_alpha(size, tail)
    for bits in (2.5, 3.5):
        for name, values in kinds.items():
            yield name, matrices.stored_bits(bits), partial(matrices.allocated, values, bits)


ABLATIONS = {"grids": grids, "storage": storage, "sensitivity": sensitivity}


def write_replaced(source: Checkpoint, weights: dict[str, Tensor], out: Path) -> None:
    """Write the source with other expert matrices, float32."""
    out.mkdir()
    for file in source.path.iterdir():
        if file.suffix in (".json", ".txt", ".model") and not file.name.endswith(".index.json"):
            shutil.copy(file, out)
    tensors = {name: tensor for file in source.path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, weight in weights.items():
        if f"{name}.weight" not in tensors:
            raise SystemExit(f"{source.path}: expected one tensor for each expert matrix, got none named {name}.weight")
        tensors[f"{name}.weight"] = weight.contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a Hugging Face checkpoint")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--only", default=",".join(ABLATIONS), help=f"out of {', '.join(ABLATIONS)} (default all)")
    parser.add_argument("--tokens", type=int, default=20480, help="predictions, about (default 20480)")
    parser.add_argument("--context", type=int, default=512, help="tokens in a window (default 512)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="where lines are appended")
    args = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(args.model, args.text, args.tokens, args.context, torch.float32, Path(work))
        matrices = Matrices(bench.source, bench.experts)
        for kind in args.only.split(","):
            for name, stored_bits, weights in ABLATIONS[kind](matrices):
                variant = Variant(name, f"benchmarks.ablations --only {kind}: {stored_bits:.3f} bits")

                def measure(weights=weights, stored_bits=stored_bits) -> dict:
                    with tempfile.TemporaryDirectory(dir=work) as folder:
                        write_replaced(bench.source, weights(), Path(folder, "plain"))
                        return {"stored_bits": stored_bits, **bench.score(Path(folder, "plain"))}

                record(bench, variant, measure, args.results)


if __name__ == "__main__":
    main()
