"""How fast the kernels are, or without a GPU, what they compile to.

    python -m benchmarks.kernels [--models mixtral,qwen1.5] [--tokens 1,8,64] [--bits 2.5,3.5] [--peers all]
    python -m benchmarks.kernels --device cpu [--threads 2]
    python -m benchmarks.kernels --static

With ``--device cpu`` see ``benchmarks.cpu_kernels``. On a GPU it times one layer's routed experts, from router output
to sum, as replays of a CUDA graph that takes several sets of weights in turn, so that none is still in the cache. A
setting whose result is not right reports no time. The limit is the larger of the bytes of the experts in use over the
bandwidth, of a copy or of a sum, whichever is more, and the operations over the speed of a dense bfloat16 product, all
measured at the start. Every row is appended to ``benchmarks/results/kernels.jsonl`` as soon as it is measured.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import random
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from alphaq_vllm.format import stored_bits_per_weight
from alphaq_vllm.kernels import MoEWeights, PackedExperts, Routing, expert_offsets, fused_moe, repack_
from alphaq_vllm.kernels.triton import devices
from alphaq_vllm.kernels.triton.tiles import tiles_for
from benchmarks.peers import PEERS
from benchmarks.sass import compile_gemm

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"
GROUP_SIZE = 64
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 16384)
# Shares of the widths 2, 3 and 4.
SHARES = {2.5: (4, 1, 1), 3.0: (1, 1, 1), 3.5: (1, 1, 4), 4.0: (0, 0, 1)}
# In bfloat16's precision and of the largest expected value; the sum of roundings of a correct kernel stays below.
MAX_ERROR = 3 * torch.finfo(torch.bfloat16).eps
CHECKED_TOKENS = 32


class Shape(NamedTuple):
    """The routed experts of a model."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


MODELS = {
    "mixtral": Shape(4096, 14336, 8, 2),
    "qwen1.5": Shape(2048, 1408, 60, 4),
    "deepseek-v2-lite": Shape(2048, 1408, 64, 6),
    "qwen3-30b": Shape(2048, 768, 128, 8),
}


class Inputs(NamedTuple):
    """What a layer is given."""

    x: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


def random_experts(
    num_experts: int, projections: int, N: int, K: int, average_bits: float, device: str = "cuda"
) -> PackedExperts:
    """Random codes in the order of a checkpoint, weights about normal with variance ``1 / K``."""
    count = num_experts * projections
    shares = SHARES[average_bits]
    deck = [width for width, share in zip((2, 3, 4), shares, strict=True) for _ in range(share)]
    dealt = (deck * count)[:count]
    random.Random(0).shuffle(dealt)
    bits = [dealt[i : i + projections] for i in range(0, count, projections)]
    offsets, words = expert_offsets(bits, N, K)
    num_bits = torch.tensor(bits, dtype=torch.int32, device=device)
    rows = (num_experts, projections, N)
    # Steps are 8.5 on average.
    scales = (torch.rand(*rows, 1, device=device) + 0.5) * 3 / 8.5 / (2.0**num_bits)[..., None, None] / K**0.5
    return PackedExperts(
        torch.randint(-(2**31), 2**31, (words,), dtype=torch.int32, device=device),
        scales.bfloat16(),
        torch.randint(0, 256, (*rows, K // GROUP_SIZE), dtype=torch.uint8, device=device),
        num_bits,
        torch.tensor(offsets, device=device),
        GROUP_SIZE,
        tuple(sorted({b for projections in bits for b in projections})),
    )


def random_inputs(shape: Shape, num_tokens: int, device: str = "cuda") -> Inputs:
    """Activations, and uniform routing to different experts."""
    x = torch.randn(num_tokens, shape.hidden_size, device=device, dtype=torch.bfloat16)
    scores = torch.rand(num_tokens, shape.num_experts, device=device)
    topk_weights, topk_ids = scores.softmax(-1).topk(shape.top_k)
    return Inputs(x, topk_weights, topk_ids.to(torch.int32))


def expected(inputs: Inputs, weights: MoEWeights) -> torch.Tensor:
    """The layer in float64, from experts in the order of the checkpoint."""
    out = torch.zeros(inputs.x.shape, dtype=torch.float64, device=inputs.x.device)
    for expert in inputs.topk_ids.unique().tolist():
        tokens, slots = (inputs.topk_ids == expert).nonzero(as_tuple=True)
        x = inputs.x[tokens].double()
        gate, up = (x @ weights.w13.matrix(expert, projection).double().T for projection in (0, 1))
        routed = weights.gate.apply(gate, up) @ weights.w2.matrix(expert, 0).double().T
        out.index_add_(0, tokens, routed * inputs.topk_weights[tokens, slots, None].double())
    return out


def is_right(actual: torch.Tensor, wanted: torch.Tensor, most: float = MAX_ERROR) -> bool:
    """Whether the largest error, by the largest value, is one that roundings explain."""
    error = (actual.double() - wanted).abs().max() / wanted.abs().max()
    return bool(error <= most)


def time_graphs(variants: Sequence[Sequence[Callable[[], torch.Tensor]]], seconds: float) -> list[float]:
    """Microseconds of one call of each variant: medians over replays of graphs that hold each of its calls once.

    Variants take turns, after as many replays that warm the GPU up, so that its clocks favour none.
    """
    graphs = []
    for calls in variants:
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graphs.append(graph)

    def rounds(count: int) -> list[list[float]]:
        events = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in graphs] for _ in range(count)]
        for turn in events:
            for graph, (start, end) in zip(graphs, turn, strict=True):
                start.record()
                graph.replay()
                end.record()
        torch.cuda.synchronize()
        return [[start.elapsed_time(end) for start, end in turn] for turn in events]

    estimate = sum(rounds(3)[-1])
    count = min(200, max(5, round(seconds * 1e3 * len(graphs) / estimate)))
    rounds(count)
    times = zip(*rounds(count), strict=True)
    return [statistics.median(own) * 1e3 / len(calls) for own, calls in zip(times, variants, strict=True)]


def measure_machine() -> dict[str, float]:
    """Bytes a second, the more of a copy (read and written) and a sum (read), and of a dense bfloat16 product's
    operations.
    """
    source = torch.ones(2**30, device="cuda")
    target = torch.empty_like(source)
    copy, read = time_graphs([[lambda: target.copy_(source)], [lambda: source.sum()]], 0.1)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    (product,) = time_graphs([[lambda: a @ b]], 0.2)
    figures = {"copy": 2 * source.nbytes / copy * 1e6, "read": source.nbytes / read * 1e6}
    return {"bytes_per_second": max(figures.values()), **figures, "flops": 2 * 8192**3 / product * 1e6}


def limit(shape: Shape, inputs: Inputs, num_bits: torch.Tensor, machine: dict[str, float]) -> float:
    """Microseconds that no kernel can beat. num_bits: ``[E, 3]``."""
    used = num_bits[inputs.topk_ids.unique().long()].flatten().tolist()
    weights = shape.hidden_size * shape.intermediate_size
    num_bytes = sum(stored_bits_per_weight(b, GROUP_SIZE) for b in used) * weights / 8
    operations = 6 * weights * inputs.topk_ids.numel()
    return max(num_bytes / machine["bytes_per_second"], operations / machine["flops"]) * 1e6


@contextmanager
def launches_apart() -> Iterator[None]:
    """Launch each kernel when the one ahead has ended, for comparison."""
    device_of = devices.device_of
    devices.device_of = lambda device: device_of(device)._replace(overlap=False)
    try:
        yield
    finally:
        devices.device_of = device_of


class Layer(NamedTuple):
    """A layer as it is timed. sets: of weights; the first is checked. wanted: for the first tokens of inputs."""

    num_bits: torch.Tensor
    sets: list[MoEWeights]
    inputs: dict[int, Inputs]
    wanted: dict[int, torch.Tensor]

    def time(
        self, tokens: int, seconds: float, settings: Sequence[Callable[[], AbstractContextManager]] = (nullcontext,)
    ) -> list[float | None]:
        """Microseconds of one call in each setting, or None if its result is not right."""
        x, *router = self.inputs[tokens]
        routing = Routing(*router)

        def call(setting: Callable[[], AbstractContextManager], weights: MoEWeights) -> torch.Tensor:
            with setting():
                return fused_moe(x, weights, routing)

        right = [s for s in settings if is_right(call(s, self.sets[0])[:CHECKED_TOKENS], self.wanted[tokens])]
        times = time_graphs([[partial(call, setting, weights) for weights in self.sets] for setting in right], seconds)
        return [dict(zip(right, times, strict=True)).get(setting) for setting in settings]


def random_layer(shape: Shape, tokens: Sequence[int], average_bits: float) -> Layer:
    """Of a model's shape, with inputs for each number of tokens."""
    sizes = (shape.intermediate_size, shape.hidden_size)
    stored = [
        random_experts(shape.num_experts, 2, *sizes, average_bits),
        random_experts(shape.num_experts, 1, *sizes[::-1], average_bits),
    ]
    inputs = {n: random_inputs(shape, n) for n in tokens}
    firsts = {n: Inputs(*(t[:CHECKED_TOKENS] for t in some)) for n, some in inputs.items()}
    wanted = {n: expected(some, MoEWeights(*stored, checked=True)) for n, some in firsts.items()}
    layer_bytes = sum(experts.packed.nbytes for experts in stored)
    copies = max(2, -(-4 * torch.cuda.get_device_properties(0).L2_cache_size // layer_bytes))
    # The bits of the copies are random anyway, so only the checked set has an order to be brought into.
    sets = [
        MoEWeights(*(PackedExperts(*(t.clone() for t in e.tensors), GROUP_SIZE, e.widths, "gpu") for e in stored))
        for _ in range(copies - 1)
    ]
    sets.insert(0, MoEWeights(*(repack_(experts) for experts in stored)))
    return Layer(torch.cat([experts.num_bits for experts in stored], 1), sets, inputs, wanted)


def measure_ours(
    shape: Shape,
    tokens: Sequence[int],
    average_bits: float,
    machine: dict[str, float],
    seconds: float,
    apart: bool = False,
) -> Iterator[dict]:
    """One row per number of tokens. apart: measure that too."""
    layer = random_layer(shape, tokens, average_bits)
    for n, inputs in layer.inputs.items():
        floor = limit(shape, inputs, layer.num_bits, machine)
        row = {"tokens": n, "kernel": "alphaq", "bits": average_bits, "limit": floor}
        us, *others = layer.time(n, seconds, [nullcontext, *([launches_apart] if apart else [])])
        row |= {"error": "wrong result"} if us is None else {"us": us, "fraction": floor / us}
        if others and others[0] is not None:
            row["us_apart"] = others[0]
        yield row


def measure_peer(name: str, shape: Shape, tokens: Sequence[int], seconds: float) -> Iterator[dict]:
    """One row per number of tokens, or one that says why there is none."""
    try:
        make_layer, copies = PEERS[name](shape), 2
        layers = [make_layer() for _ in range(copies)]
    except Exception as error:
        yield {"kernel": name, "error": f"{type(error).__name__}: {error}"[:200]}
        return
    for n in tokens:
        inputs = random_inputs(shape, n)
        try:
            (us,) = time_graphs([[partial(layer, *inputs) for layer in layers]], seconds)
            yield {"tokens": n, "kernel": name, "us": us}
        except Exception as error:
            yield {"tokens": n, "kernel": name, "error": f"{type(error).__name__}: {error}"[:200]}


def describe_run() -> dict[str, str]:
    """What a reader must know to compare rows."""
    # A lent machine may have neither git nor the repository's history.
    commit = os.environ.get("COMMIT") or subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True)
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit.strip(),
        "gpu": gpu[0] if gpu else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def run_timing(arguments: argparse.Namespace) -> None:
    """Measure, append to the results, and print a table last."""
    machine = measure_machine()
    run = describe_run() | machine
    print(json.dumps(run), flush=True)
    rows: list[dict] = []
    seconds = arguments.seconds or 0.1
    for model in arguments.models:
        shape = MODELS[model]
        peers = PEERS if arguments.peers is None else arguments.peers
        measured = [measure_peer(peer, shape, arguments.tokens, seconds) for peer in peers]
        measured += [
            measure_ours(shape, arguments.tokens, bits, machine, seconds, arguments.apart) for bits in arguments.bits
        ]
        # Each as soon as it is measured, for time on a lent GPU may end.
        for row in itertools.chain.from_iterable(measured):
            rows.append({"model": model, **row})
            with RESULTS.open("a") as file:
                file.write(json.dumps(rows[-1] | run) + "\n")
            print(json.dumps(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    print_table(rows)


def print_table(rows: Sequence[dict]) -> None:
    """Microseconds, percent of the limit, and how many times as fast as each peer."""
    peers = {(r["model"], r["tokens"], r["kernel"]): r["us"] for r in rows if "us" in r and r["kernel"] != "alphaq"}
    print(f"{'model':17} {'bits':>4} {'tokens':>6} {'us':>9} {'limit':>6}  speed against peers")
    for r in rows:
        if r["kernel"] != "alphaq" or "us" not in r:
            if "error" in r:
                print(f"{r['model']:17} {r['kernel']} {r.get('bits', '')} {r.get('tokens', '')}: {r['error']}")
            continue
        ratios = [
            f"{name} {us / r['us']:.2f}" for (m, n, name), us in peers.items() if (m, n) == (r["model"], r["tokens"])
        ]
        if "us_apart" in r:
            ratios.append(f"launched apart {r['us_apart'] / r['us']:.2f}")
        print(f"{r['model']:17} {r['bits']:4} {r['tokens']:6} {r['us']:9.1f} {r['fraction']:6.0%}  {', '.join(ratios)}")


def run_static(arguments: argparse.Namespace) -> None:
    """Print one line for every kernel that serves an average of 2 to 4 bits."""
    if not arguments.json:
        print("  sm width block_m registers spilled shared programs integer/weight 16-byte loads matrix")
    for sm in arguments.sm:
        for width in arguments.widths:
            for tiles in tiles_for(sm // 10, width):
                code = compile_gemm(sm, arguments.dtype, tiles, (width,), arguments.group_size)
                if arguments.json:
                    print(json.dumps(code.as_dict()), flush=True)
                    continue
                print(
                    f"{sm:4} {width:5} {code.block_m:7} {code.registers:9} {code.spilled_bytes:7} "
                    f"{code.shared_bytes:6} {code.programs:8} {code.integer_per_weight:14.2f} {code.wide_loads:13} "
                    f"{code.matrix}",
                    flush=True,
                )


def several(kind: type) -> Callable[[str], list]:
    """For argparse: values separated by commas."""
    return lambda text: [kind(part) for part in text.split(",") if part]


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--static", action="store_true", help="compile only, for absent GPUs")
    parser.add_argument("--json", action="store_true", help="with --static: JSON lines")
    parser.add_argument("--group-size", type=int, default=GROUP_SIZE, help="with --static")
    parser.add_argument("--sm", type=several(int), default=[80, 90, 100])
    parser.add_argument("--widths", type=several(int), default=[2, 3, 4])
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16"])
    parser.add_argument("--models", type=several(str), default=list(MODELS))
    parser.add_argument("--tokens", type=several(int), default=list(TOKENS))
    parser.add_argument("--bits", type=several(float), default=[2.5, 3.5], help=f"out of {sorted(SHARES)}")
    parser.add_argument("--peers", type=lambda t: None if t == "all" else several(str)(t), help="by default all")
    parser.add_argument("--apart", action="store_true", help="also time launches that do not overlap")
    parser.add_argument("--seconds", type=float, help="of calls for each setting, by default 0.1, on a CPU 3")
    parser.add_argument("--threads", type=int, help="on a CPU; by default one for each core that may be used")
    return parser


def main() -> None:
    """The command."""
    parser = build_parser()
    arguments = parser.parse_args()
    if arguments.static:
        run_static(arguments)
    elif arguments.device == "cpu":
        # It takes vLLM's operators, and no Triton.
        from benchmarks import cpu_kernels

        cpu_kernels.run(arguments)
    elif torch.cuda.is_available():
        run_timing(arguments)
    else:
        parser.error("there is no GPU to time: use --device cpu or --static")


if __name__ == "__main__":
    main()
