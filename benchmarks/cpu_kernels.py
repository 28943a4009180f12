"""How fast the routed experts of one layer are on a CPU, beside other programs in the same process.

    python -m benchmarks.kernels --device cpu [--models qwen1.5,mixtral] [--tokens 1,8] [--bits 3.5] [--threads 2]

Every call has its own routing and the next of several sets of weights, which together are larger than the last-level
cache twice over; the time is the median. The limit is the time to read the experts in use at the speed of a sum over
two gigabytes, measured at the start on as many threads. A setting whose result is not right reports no time.
``ALPHAQ_CPU_ACTIVATIONS=int8`` in the environment has activations rounded to 8 bits. Every row is appended to
``benchmarks/results/cpu_kernels.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from alphaq_vllm.cores import available_cores
from alphaq_vllm.format import stored_bits_per_weight
from alphaq_vllm.kernels import MoEWeights, PackedExperts, Routing, fused_moe, prepare_
from alphaq_vllm.kernels.cpu import native
from benchmarks.cpu_peers import PEERS
from benchmarks.kernels import (
    CHECKED_TOKENS,
    GROUP_SIZE,
    MAX_ERROR,
    MODELS,
    Inputs,
    Shape,
    expected,
    is_right,
    random_experts,
    random_inputs,
)
from benchmarks.machine import machine

RESULTS = Path(__file__).parent / "results" / "cpu_kernels.jsonl"
# Calls for a median, where they do not take longer than the seconds that a setting has.
CALLS = 50
# What rows call this project's kernel, and its largest error by the largest value, by what becomes of activations.
BY_ACTIVATIONS = {"exact": ("alphaq", MAX_ERROR), "int8": ("alphaq, int8", 0.05)}


def median_seconds(
    layers: Sequence[Callable[[Inputs], torch.Tensor]], cases: Sequence[Inputs], seconds: float
) -> float:
    """The median of calls that take the layers and the cases in turn."""
    times: list[float] = []
    for i in range(CALLS):
        layer, inputs = layers[i % len(layers)], cases[i % len(cases)]
        start = time.perf_counter()
        layer(inputs)
        times.append(time.perf_counter() - start)
        if sum(times) > seconds and i > 1:
            break
    # The first call warms up.
    return statistics.median(times[1:])


def read_bandwidth() -> float:
    """Bytes a second of a sum over two gigabytes."""
    values = torch.ones(2**29)
    return values.nbytes / median_seconds([lambda _: values.sum()], [random_inputs(MODELS["qwen1.5"], 1, "cpu")], 2)


def last_level_cache() -> int:
    """Bytes, as Linux tells them; 64 MiB where it does not."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(size[:-1]) * 1024 for size in (cache.read_text().strip() for cache in caches) if size.endswith("K")]
    return max(sizes, default=64 << 20)


def used_bytes(shape: Shape, inputs: Inputs, stored_bits: torch.Tensor) -> float:
    """Of the experts in use; stored_bits: of a weight of each matrix, ``[E, 3]``."""
    experts = inputs.topk_ids.unique().long()
    return float(stored_bits[experts].sum()) * shape.hidden_size * shape.intermediate_size / 8


class Ours:
    """Sets of one layer's experts, the first of which is checked."""

    def __init__(self, shape: Shape, bits: float) -> None:
        sizes = (shape.intermediate_size, shape.hidden_size)
        stored = [
            random_experts(shape.num_experts, 2, *sizes, bits, "cpu"),
            random_experts(shape.num_experts, 1, *sizes[::-1], bits, "cpu"),
        ]
        num_bits = torch.cat([experts.num_bits for experts in stored], 1)
        self.stored_bits = num_bits + stored_bits_per_weight(0, GROUP_SIZE)
        self.right = self._is_right(shape, stored)
        number = max(2, -(-2 * last_level_cache() // sum(experts.packed.nbytes for experts in stored)))
        self.sets = [MoEWeights(*(_prepared(experts) for experts in stored)) for _ in range(number)]

    @staticmethod
    def _is_right(shape: Shape, stored: list[PackedExperts]) -> bool:
        inputs = random_inputs(shape, CHECKED_TOKENS, "cpu")
        weights = MoEWeights(*(_prepared(experts) for experts in stored))
        actual = fused_moe(inputs.x, weights, Routing(inputs.topk_weights, inputs.topk_ids))
        return is_right(actual, expected(inputs, MoEWeights(*stored)), BY_ACTIVATIONS[native.chosen_activations()][1])

    def layers(self) -> list[Callable[[Inputs], torch.Tensor]]:
        """One for each set."""
        return [
            lambda i, weights=weights: fused_moe(i.x, weights, Routing(i.topk_weights, i.topk_ids))
            for weights in self.sets
        ]


def _prepared(experts: PackedExperts) -> PackedExperts:
    return prepare_(PackedExperts(*(tensor.clone() for tensor in experts.tensors), GROUP_SIZE, experts.widths))


def measure(shape: Shape, arguments: argparse.Namespace, bandwidth: float) -> list[dict]:
    """Rows of all programs, numbers of tokens and widths."""
    seconds = arguments.seconds or 3
    cases = {n: [random_inputs(shape, n, "cpu") for _ in range(CALLS if n <= 64 else 8)] for n in arguments.tokens}
    rows: list[dict] = []

    def add(kernel: str, bits: float | None, layers: Sequence[Callable], stored_bits: torch.Tensor) -> None:
        for n, inputs in cases.items():
            limit = statistics.median(used_bytes(shape, i, stored_bits) for i in inputs) / bandwidth
            taken = median_seconds(layers, inputs, seconds)
            row = {"tokens": n, "kernel": kernel, "bits": bits, "ms": taken * 1e3, "limit_ms": limit * 1e3}
            rows.append(row)
            print(json.dumps(row), flush=True)

    for name in PEERS if arguments.peers is None else arguments.peers:
        try:
            make_layer, bits = PEERS[name]
            layer = make_layer(shape)
            add(name, None, [lambda i, layer=layer: layer(*i)], torch.full((shape.num_experts, 3), bits))
        except Exception as error:
            rows.append({"kernel": name, "error": f"{type(error).__name__}: {error}"[:200]})
    name = BY_ACTIVATIONS[native.chosen_activations()][0]
    for bits in arguments.bits:
        ours = Ours(shape, bits)
        if ours.right:
            add(name, bits, ours.layers(), ours.stored_bits)
        else:
            rows.append({"kernel": name, "bits": bits, "error": "wrong result"})
    return rows


def print_table(rows: Sequence[dict]) -> None:
    """Milliseconds, percent of the read limit, and how many times as fast as each peer."""
    ours = {name for name, _ in BY_ACTIVATIONS.values()}
    peers = {(r["model"], r["tokens"], r["kernel"]): r["ms"] for r in rows if "ms" in r and r["kernel"] not in ours}
    print(f"{'model':17} {'bits':>4} {'tokens':>6} {'ms':>9} {'limit':>6}  speed against peers")
    for r in rows:
        if "error" in r:
            print(f"{r['model']:17} {r['kernel']} {r.get('bits', '')}: {r['error']}")
        elif r["kernel"] in ours:
            here = (r["model"], r["tokens"])
            ratios = [f"{name} {ms / r['ms']:.2f}" for (m, n, name), ms in peers.items() if (m, n) == here]
            fraction = r["limit_ms"] / r["ms"]
            print(f"{r['model']:17} {r['bits']:4} {r['tokens']:6} {r['ms']:9.2f} {fraction:6.0%}  {', '.join(ratios)}")


def run(arguments: argparse.Namespace) -> None:
    """Measure, append to the results, and print a table last."""
    threads = arguments.threads or available_cores()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    about = machine() | {
        "threads": threads,
        "instruction_set": native.best_instruction_set(),
        "bytes_per_second": read_bandwidth(),
        "last_level_cache": last_level_cache(),
    }
    print(json.dumps(about), flush=True)
    rows = []
    for model in arguments.models:
        measured = [{"model": model, **row} for row in measure(MODELS[model], arguments, about["bytes_per_second"])]
        with RESULTS.open("a") as file:
            file.writelines(json.dumps({**row, **about}) + "\n" for row in measured)
        rows += measured
    print_table(rows)
