"""How long each phase of a conversion will take, from a piece of it done here and now."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from offline.allocation.bit_map import average_bits
from offline.allocation.widths import Budget
from offline.journal import Journal
from offline.layerwise.sequential import SequentialGptq
from offline.model.decoder import Decoder
from offline.model.layer import advance, route
from offline.model.passes import passed
from offline.model.sampling import predictions_held
from offline.model.text import CONTEXT_TOKENS
from offline.operations.plan import Job, pieces
from offline.quantizers.drift import looked_at, tells_all
from offline.quantizers.gptq import Feedback, blocks, gptq
from offline.quantizers.quantize import quantize
from offline.sensitivity.matrices import describe
from offline.sensitivity.propagation import LENGTH, TOKENS, expert_gains
from offline.source.architectures import experts_per_token
from offline.source.families import ExpertMatrix, Experts, by_expert, load_weight
from offline.threads import compute_device, one_thread

# A group's search takes the same time whatever is in it, so few rows tell; so do few tokens.
_ROWS, _RUNS, _TOKENS = 64, 3, 256
# Of gptq, which takes less time for each of more rows.
_GPTQ_ROWS = 512
# Rows and columns of matrices whose product tells how fast products are.
_SIDE = 2048


@one_thread()
def expect(
    job: Job,
    every_expert: Experts,
    widths: Budget | Mapping[str, int],
    gptq: SequentialGptq | None,
    measured: bool,
    journal: Journal | None = None,
) -> dict[str, float]:
    """Seconds by phase, in order, by the names of their progress.

    every_expert: of the source; measured: whether there are statistics already; journal: of what is done and takes no
    time again.
    """
    budget = widths if isinstance(widths, Budget) else None
    matrices = job.experts.matrices
    num_bits = round(budget.average_bits if budget else average_bits(widths, matrices))  # type: ignore[arg-type]
    expected: dict[str, float] = {}
    if budget and budget.needs_alpha and not measured:
        some = (budget.measured_widths, job.group_size, job.data_free_quantizer)
        first = by_expert(matrices)[0]
        seconds = _seconds(lambda: describe(job.source, first, *some)) / len(first)
        expected["measure"] = seconds * (len(matrices) - _entries(journal, "stats")) / job.workers
    propagated = bool(budget and budget.needs_gains and not measured)
    if propagated or gptq:
        decoder = gptq.decoder if gptq else Decoder(job.source, every_expert)
        pace = _pace(decoder, job, every_expert)
        done = {phase: passed(journal, phase, len(decoder.layers)) for phase in ("text", "propagate", "gptq")}
        own = bool(gptq and gptq.own_text)
        shared = bool(gptq and gptq.writes(TOKENS, LENGTH))
        texts = [min(CONTEXT_TOKENS, gptq.tokens)] if gptq and own else []
        texts += [min(CONTEXT_TOKENS, TOKENS)] if propagated and not shared else []
        # Each is written in two passes.
        left = max(0.0, 1 - done["text"] / (2 * len(texts))) if texts else 0.0
        expected["text"] = left * 2 * sum(pace.run(tokens) + pace.predict(tokens) for tokens in texts)
    if propagated:
        expected["propagate"] = (1 - done["propagate"]) * (pace.run(TOKENS) + pace.experts(pace.gains))
    if gptq:
        seconds = pace.experts(_gptq_seconds(job, num_bits, pace.routed(gptq.tokens))) + pace.outputs(gptq.tokens)
        expected["gptq"] = (1 - done["gptq"]) * (pace.enter(gptq.tokens) + seconds)
    # The rest is copied.
    numel = sum(matrix.numel for matrix in job.drafts) + (0 if gptq else job.experts.numel)
    rows = load_weight(job.source, matrices[0])[:_ROWS]
    seconds = _seconds_per_weight(rows, num_bits, job.group_size, job.data_free_quantizer) if numel else 0.0
    number = len(pieces(job, {matrix.name: num_bits for matrix in matrices}))
    expected["write"] = seconds * numel / job.workers * (1 - _entries(journal, "written") / number)
    return expected


def _entries(journal: Journal | None, kind: str) -> int:
    """The number of different entries of a kind."""
    entries = journal.entries if journal else []
    return len({json.dumps(entry[kind]) for entry in entries if kind in entry})


@one_thread()
def seconds_without_weights(columns: int, numel: int, bits: float, group_size: int, workers: int) -> float:
    """Seconds that quantizing by ``mse`` will take, from quantizing random rows here and now.

    columns: of a row; numel: weights to quantize; bits: their average width, which is taken for that of all.
    """
    rows = torch.randn(_ROWS, columns, device=compute_device())
    return _seconds_per_weight(rows, max(1, round(bits)), group_size, "mse") * numel / workers


def _gptq_seconds(job: Job, num_bits: int, tokens: int) -> float:
    """Of quantizing an expert that so many tokens reach, but for running it."""
    first = by_expert(job.experts.matrices)[0]
    *into, (out_features, inner) = (matrix.shape for matrix in first)
    # Columns of down that are quantized together.
    within = blocks(tokens, inner, job.group_size)[0].stop
    rows = load_weight(job.source, first[0])[:_GPTQ_ROWS]
    columns = rows.shape[1]
    order, ones = torch.arange(columns, device=rows.device), torch.ones(columns, device=rows.device)
    back = Feedback(order, ones.diag(), ones)
    # The first run also sets things up.
    grids = min(_seconds(lambda: gptq(rows, back, num_bits, job.group_size)) for _ in range(_RUNS)) / rows.numel()
    square = torch.ones(_SIDE, _SIDE, device=rows.device)
    rate = 2 * _SIDE**3 / min(_seconds(lambda: square @ square) for _ in range(_RUNS))
    # Half of X^T X, a Cholesky factor of it, and what more errors do to other columns where these are more.
    operations = sum(number * (tokens * size + size**2 / 3) for number, size in ((columns, columns), (inner, within)))
    operations += out_features * inner * (within - columns)
    # What the first matrices made of tokens, and what down has to make up for.
    whole = tells_all(tokens, inner)
    seen = tokens if whole else len(range(tokens)[looked_at(tokens)])
    operations += 2 * seen * sum(rows * columns for rows, columns in into)
    operations += out_features * inner * within + (2 * (tokens + out_features) * inner**2 if whole else 0)
    return operations / rate + grids * sum(matrix.numel for matrix in first)


def _seconds_per_weight(rows: torch.Tensor, num_bits: int, group_size: int, quantizer: str) -> float:
    # The first run also sets things up.
    return min(_seconds(lambda: quantize(rows, num_bits, group_size, quantizer)) for _ in range(_RUNS)) / rows.numel()


@dataclass(frozen=True)
class _Pace:
    """How fast the model runs: seconds on one thread.

    layers: that have experts; entered: of these, and of those that have none, how many there are, and what it takes to
    load one without its experts, and to take a window of ``LENGTH`` through it; expert: to load an expert; token: to
    take a token through one; gains: see ``expert_gains``; head: to draw as many tokens as are ``held`` together, on all
    threads.
    """

    job: Job
    layers: int
    num_experts: int
    top_k: int
    entered: list[tuple[int, float, float]]
    expert: float
    token: float
    gains: float
    head: float
    held: int

    def routed(self, tokens: int) -> int:
        """The share of the tokens that an expert gets."""
        return max(1, tokens * self.top_k // self.num_experts)

    def enter(self, tokens: int) -> float:
        """A pass without the experts."""
        windows = tokens / LENGTH / self.job.workers
        return sum(number * (load + windows * window) for number, load, window in self.entered)

    def experts(self, seconds: float) -> float:
        """What takes so long for each expert."""
        return self.layers * self.num_experts * seconds / self.job.workers

    def predict(self, tokens: int) -> float:
        """Drawing a token after each of so many."""
        return tokens / self.held * self.head

    def run(self, tokens: int) -> float:
        """A whole pass."""
        return self.enter(tokens) + self.experts(self.expert + self.routed(tokens) * self.token)

    def outputs(self, tokens: int) -> float:
        """Running all experts, but for down's part in the last layer, after which nothing comes."""
        return (1 - 1 / (3 * self.layers)) * self.experts(self.routed(tokens) * self.token)


@torch.no_grad()
def _pace(decoder: Decoder, job: Job, experts: Experts) -> _Pace:
    source, device = job.source, compute_device()
    length = min(LENGTH, decoder.context)
    windows = torch.randint(decoder.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    hidden = decoder.embed(source, windows, device)
    number = next(number for number, layer in enumerate(decoder.layers) if layer.source_experts is not None)
    layer = decoder.layers[number]
    if layer.takes:
        # Layers before it have something for it.
        for before in decoder.layers[:number]:
            with before.loaded(source, device):
                advance(before, hidden)
    start = time.monotonic()
    with layer.loaded(source, device):
        load = time.monotonic() - start
        # The first run also finds out what the layer does with its experts.
        formula = route(layer, hidden.clone()).formula.of(0)
        window = _seconds(lambda: route(layer, hidden.clone())) * LENGTH / length
    entered = [(len(experts.modules), load, window)]
    if others := [layer for layer in decoder.layers if layer.source_experts is None]:
        # The first that needs nothing of those before it is taken for all, or else the one with experts.
        if plain := next((layer for layer in others if not layer.takes), None):
            start = time.monotonic()
            with plain.loaded(source, device):
                load = time.monotonic() - start
                window = min(_seconds(lambda: advance(plain, hidden.clone())) for _ in range(2)) * LENGTH / length
        entered.append((len(others), load, window))
    first = experts.of(str(layer.source_experts))[0]
    weights: list[torch.Tensor] = []
    load_expert = _seconds(lambda: weights.extend(load_weight(source, matrix) for matrix in first))
    inputs, topk_weights = _routed(job, _TOKENS)
    *into, down = weights

    def compute() -> None:
        formula.project(formula.inner(inputs, into), down, topk_weights)

    def gains(tokens: int) -> float:
        some = inputs[:tokens], topk_weights[:tokens], formula, job.group_size
        return _seconds(lambda: expert_gains(source, first, *some))

    top_k = experts_per_token(source.config)
    held = min(length, predictions_held(decoder.vocab_size))
    shares = torch.full((1, held, 1), 0.5, dtype=torch.float64)
    few, many, reached = gains(1), gains(_TOKENS), TOKENS * top_k / experts.num_experts
    return _Pace(
        job,
        layers=len(experts.modules),
        num_experts=experts.num_experts,
        top_k=top_k,
        entered=entered,
        expert=load_expert,
        token=_seconds(compute) / _TOKENS,
        gains=few + max(0.0, many - few) * reached / _TOKENS,
        head=_seconds(lambda: decoder.sample(source, hidden[:, :held], shares, job.workers)),
        held=held,
    )


def _routed(job: Job, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    matrix: ExpertMatrix = job.experts.matrices[0]
    device = compute_device()
    inputs = torch.randn(tokens, matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(device)
    return inputs, torch.ones(tokens, device=device)


def _seconds(function: Callable[[], object]) -> float:
    start = time.monotonic()
    function()
    if compute_device().type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - start
