"""Which widths to choose by, where nothing runs the model: maps of widths from weights alone, each beside the same
widths at random.

    python -m benchmarks.weights_only MODEL --text FILE... [--bits 2.5,3,3.5,4] [--maps NAME,NAME] [--seeds 5]

A map gives every expert matrix a width. Its control has as many matrices of each width, shuffled with several seeds: a
map that knows something of a matrix beats its control. All are quantized by ``--quantizer mse`` and scored as by
``benchmarks.quality``. Each map at each budget is a line of JSON in ``benchmarks/results/weights_only.jsonl``; what is
there already is not measured again. Checkpoints with one tensor for each matrix only.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from benchmarks.ablations import Matrices, write_replaced
from benchmarks.alternatives import restored
from benchmarks.machine import machine
from benchmarks.quality import Bench, known
from offline.allocation.costs import relative_reach
from offline.allocation.knapsack import auto_gamma, importance
from offline.allocation.modes import least_cost, randomly, uniform
from offline.quantizers.grids import GRIDS
from offline.sensitivity.matrices import MatrixStats
from offline.sensitivity.reach import activation_of, reaches
from offline.sensitivity.spectra import choose_block_size, hill_alpha
from offline.source.families import by_expert

RESULTS = Path(__file__).parent / "results" / "weights_only.jsonl"
# The converter's candidates, and for a budget that leaves them no choice those around it.
CANDIDATES = (2, 3, 4)
WIDER = (3, 4, 5)


class Measured(Matrices):
    """The expert matrices of a model, and what their weights say."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.restored = cache(self._restored)

    def _restored(self, name: str, num_bits: int, grid: str = "mse") -> Tensor:
        return restored(self.weights[name], num_bits, GRIDS[grid])

    def error(self, widths: Sequence[int]) -> np.ndarray:
        """Mean squared error of every matrix at each width, ``[matrices, widths]``."""
        pairs = [
            [float((weight - self.restored(name, width)).square().mean()) for width in widths]
            for name, weight in self.weights.items()
        ]
        return np.array(pairs, np.float64)

    @cached_property
    def alphas(self) -> np.ndarray:
        """PL_Alpha_Hill of every matrix."""
        size = choose_block_size(weight.shape for weight in self.weights.values())
        return self.values(lambda weight: hill_alpha(weight, size))

    @cached_property
    def variance(self) -> np.ndarray:
        """Of the weights of every matrix."""
        return self.values(lambda weight: float(weight.var(correction=0)))

    @cached_property
    def spectral_norm(self) -> np.ndarray:
        """The largest singular value of every matrix."""
        return self.values(lambda weight: float(torch.linalg.matrix_norm(weight, 2)))

    @cached_property
    def kurtosis(self) -> np.ndarray:
        """The fourth standardized moment of the weights."""
        return self.values(lambda w: float(((w - w.mean()) / w.std(correction=0)).pow(4).mean()))

    @cached_property
    def reach(self) -> np.ndarray:
        """What ``--noise expert`` weighs errors by."""
        activation = activation_of(self.source.config)
        stats = [
            MatrixStats(matrix.name, alpha=0.0, variance=0.0, reach=reach, numel=matrix.numel, mse={})
            for expert in by_expert(self.experts)
            for matrix, reach in zip(expert, reaches([self.weights[m.name] for m in expert], activation), strict=True)
        ]
        return relative_reach(stats)

    @cached_property
    def through_expert(self) -> np.ndarray:
        """See ``made_up``."""
        return self.made_up(router=False)

    @cached_property
    def through_router(self) -> np.ndarray:
        """See ``made_up``."""
        return self.made_up(router=True)


def _by_gamma(gamma: float | None) -> Callable[[Measured], np.ndarray]:
    return lambda m: importance(m.alphas, auto_gamma(m.alphas) if gamma is None else gamma)


# What an error in a matrix is held to matter, by weight of the matrix.
SENSITIVITIES: dict[str, Callable[[Measured], np.ndarray]] = {
    "alpha": _by_gamma(None),
    "alpha, gamma 4": _by_gamma(4),
    "alpha, gamma 2": _by_gamma(2),
    "alpha, gamma 1": _by_gamma(1),
    "squared error (gamma 0)": _by_gamma(0),
    "relative error": lambda m: 1 / m.variance,
    "kurtosis": lambda m: m.kurtosis / m.variance,
    # That is relative error times stable rank.
    "error over the spectral norm": lambda m: 1 / m.spectral_norm**2,
    "expert": lambda m: m.reach,
    "through the expert": lambda m: m.through_expert,
    "through router and expert": lambda m: m.through_router,
}


def widths_of(measured: Measured, name: str, bits: float, seed: int = 0) -> tuple[int, ...]:
    """The widths that the map of this name gives at a budget, by matrix; seed: of random ones."""
    matrices = measured.experts
    widths = WIDER if bits == CANDIDATES[-1] else CANDIDATES
    if name.startswith("uniform"):
        return tuple(uniform(matrices, widths, bits).tolist())
    if name == "random":
        return tuple(randomly(matrices, widths, bits, "projection", seed).tolist())
    if name == "paper":
        error = np.outer(measured.variance, 4.0 ** -np.array(widths))
        sensitivity = SENSITIVITIES["alpha"](measured)
    else:
        error = measured.error(widths)
        sensitivity = SENSITIVITIES[name](measured)
    numel = np.array([matrix.numel for matrix in matrices])
    chosen, _ = least_cost(matrices, (sensitivity * numel)[:, None] * error, widths, bits, "projection")
    return tuple(chosen.tolist())


MAPS = ("uniform", "uniform, rtn", "uniform, hqq", "random", "paper", *SENSITIVITIES)


class Maps:
    """All maps of one model, scored on one text."""

    def __init__(self, bench: Bench, work: Path) -> None:
        self.bench, self.work = bench, work
        self.measured = Measured(bench.source, bench.experts)
        # Many maps agree, and so do the controls of those with as many matrices of each width.
        self.score = cache(self._score)

    def _score(self, widths: tuple[int, ...], grid: str = "mse") -> dict[str, float]:
        """What the model predicts with these widths."""
        names = self.measured.weights
        weights = {name: self.measured.restored(name, width, grid) for name, width in zip(names, widths, strict=True)}
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            write_replaced(self.bench.source, weights, Path(folder, "plain"))
            return self.bench.score(Path(folder, "plain"))

    def row(self, name: str, bits: float, seeds: int) -> dict[str, Any]:
        """A map at a budget, and its control: its widths shuffled, or other random ones."""
        widths = widths_of(self.measured, name, bits)
        grid = name.partition(", ")[2] if name.startswith("uniform, ") else "mse"
        row: dict[str, Any] = {
            "bits": bits,
            "widths": {str(width): widths.count(width) for width in sorted(set(widths))},
            **self.score(widths, grid),
        }
        controls = []
        for seed in range(1, seeds + 1):
            if name == "random":
                other = widths_of(self.measured, name, bits, seed)
            else:
                other = tuple(random.Random(seed).sample(sorted(widths), len(widths)))
            controls.append(self.score(other, grid))
        for figure in ("kl", "perplexity"):
            row[f"control_{figure}"] = [control[figure] for control in controls]
        return row


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a Hugging Face checkpoint")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--bits", default="2.5,3,3.5,4", help="averages of code bits (default 2.5,3,3.5,4)")
    parser.add_argument("--maps", help="names, with semicolons between them (default all)")
    parser.add_argument("--seeds", type=int, default=5, help="of the control (default 5)")
    parser.add_argument("--tokens", type=int, default=20480, help="predictions, about (default 20480)")
    parser.add_argument("--context", type=int, default=256, help="tokens in a window (default 256)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="where lines are appended")
    return parser


def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        bench = Bench(args.model, args.text, args.tokens, args.context, torch.float32, work)
        maps = Maps(bench, work)
        for bits in map(float, args.bits.split(",")):
            for name in args.maps.split(";") if args.maps else MAPS:
                arguments = f"{bits:g} bits, {args.seeds} seeds"
                if (name, arguments) in known(args.results, bench.identity):
                    continue
                row = {**bench.identity, "variant": name, "arguments": arguments}
                row |= {**maps.row(name, bits, args.seeds), **machine()}
                with args.results.open("a") as file:
                    print(json.dumps(row), file=file)
                control = np.array(row["control_kl"] or [np.nan])
                print(
                    f"{bits:g} bits  {name:60} KL {row['kl']:.4f} +- {row['kl_error']:.4f}  "
                    f"control {control.mean():.4f}  perplexity {row['perplexity']:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
