"""How much memory a conversion takes, by the shapes of its model alone, and what makes it keep to a limit."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from offline.layerwise.sequential import SequentialGptq
from offline.model.decoder import Decoder
from offline.model.sampling import MAX_PREDICTIONS
from offline.model.text import CONTEXT_TOKENS
from offline.operations.plan import Job
from offline.progress import format_bytes
from offline.quantizers.drift import tells_all
from offline.quantizers.gptq import blocks
from offline.sensitivity.propagation import TOKENS
from offline.source.architectures import experts_per_token, text_config
from offline.threads import choose_workers

# Of a process that has imported all it needs: the one that is started, the one that starts workers, and a worker.
MAIN, SERVER, WORKER = 560_000_000, 110_000_000, 110_000_000
# Matrices in float32, as large as an expert's largest, that are held together: while errors at widths are measured,
# while an expert runs, while the errors of one are propagated, and by gptq beside inputs and their factor.
_MEASURED, _RUN, _PROPAGATED, _QUANTIZED = 5.5, 3, 6, 3
_ITEMSIZE = torch.float32.itemsize
# Times the tokens of the average expert that one may get.
_BUSIEST = 2


@dataclass(frozen=True)
class Shapes:
    """What memory depends on: features of a token and of experts inside; weights of an expert's matrix, of a layer
    without its experts, and of what predicts tokens, in bytes; words; heads of attention; and the share of tokens that
    an expert gets.
    """

    hidden: int
    inner: int
    matrix: int
    layer: int
    head: int
    words: int
    heads: int
    share: float


def shapes_of(job: Job, decoder: Decoder | None) -> Shapes:
    """Those of a model; decoder: where it is run."""
    matrices = job.experts.matrices
    sides = {side for matrix in matrices[:3] for side in matrix.shape}
    hidden = decoder.hidden_size if decoder else max(sides)
    config = text_config(job.source.config)
    heads = config.get("num_attention_heads")
    return Shapes(
        hidden,
        max(sides - {hidden}, default=hidden),
        max(matrix.numel for matrix in matrices) * _ITEMSIZE,
        decoder.layer_bytes(job.source) if decoder else 0,
        decoder.head_bytes(job.source) if decoder else 0,
        decoder.vocab_size if decoder else 0,
        heads if isinstance(heads, int) else 1,
        experts_per_token(job.source.config) / job.experts.num_experts,
    )


def peak_bytes(shapes: Shapes, workers: int, tokens: int = 0, length: int = 0, propagated: bool = False) -> int:
    """The most memory that a conversion takes at a time, about.

    tokens, length: of gptq and of its windows, none without it; propagated: whether errors are.
    """
    processes = MAIN + (SERVER + workers * WORKER if workers > 1 else 0)
    phases = [processes + workers * _MEASURED * shapes.matrix]
    vector, inner = shapes.hidden * _ITEMSIZE, shapes.inner * _ITEMSIZE
    window = length * (2 * shapes.heads * length * _ITEMSIZE + 8 * vector)

    def passing(count: int, beside: float) -> float:
        """A pass of so many tokens, with so many bytes beside in each worker while experts are at work."""
        return processes + 2 * count * vector + max(shapes.layer + workers * window, workers * beside)

    if propagated or tokens:
        some = CONTEXT_TOKENS if tokens else TOKENS
        reached = some * shapes.share
        phases.append(passing(some, _RUN * shapes.matrix + reached * (2 * vector + 3 * inner)))
        predictions = min(MAX_PREDICTIONS, some * shapes.words) * _ITEMSIZE
        phases.append(MAIN + 3 * some * vector + shapes.head + 1.5 * predictions)
    if propagated:
        phases.append(passing(TOKENS, _PROPAGATED * shapes.matrix + TOKENS * shapes.share * (2 * vector + 4 * inner)))
    if tokens:
        reached = tokens * shapes.share
        # Of the factor of gate's and up's inputs, or of down's, beside what became of these.
        # An expert may get more tokens than the average, and from as many on as features all are quantized together.
        most = int(min(tokens, _BUSIEST * reached))
        inside = blocks(most, shapes.inner, 1)[0].stop ** 2 * (2 if tells_all(most, shapes.inner) else 1)
        square = max(shapes.hidden**2, inside) * _ITEMSIZE
        phases.append(passing(tokens, reached * (2 * vector + inner) + square + _QUANTIZED * shapes.matrix))
    return round(max(phases))


def available_bytes(root: Path = Path("/sys/fs/cgroup"), system: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that this process can still get, by the system and the limit of its control group; None if unknown."""
    found = []
    with suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":", 1) for line in system.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    for group, limit, used, prefix in (
        (root, "memory.max", "memory.current", ""),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        # There may be none, or it says max.
        with suppress(OSError, KeyError, ValueError):
            left = int((group / limit).read_text()) - int((group / used).read_text())
            parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # What files have left in memory counts as used, and is given back when it is wanted.
            found.append(left + sum(int(parts[f"{prefix}{kind}_file"]) for kind in ("active", "inactive")))
    return min(found, default=None)


@dataclass(frozen=True)
class Fitted:
    """Workers and tokens of gptq, and the memory that they take, about; less: a line for the user where they are fewer
    than they would be with more memory.
    """

    workers: int
    tokens: int
    nbytes: int
    less: str = ""


def fit(
    job: Job,
    gptq: SequentialGptq | None,
    decoder: Decoder | None,
    propagated: bool,
    workers: int | None,
    limit: int | None,
    fixed: bool,
) -> Fitted:
    """As many workers as memory lets work, and then, if one alone takes more than the user allows, fewer tokens.

    Without a limit of the user's, workers keep to the memory that there is. decoder: where the model is run;
    propagated: whether errors are; workers: as the user says; limit: in bytes; fixed: whether the text is what the user
    asked for. Raises ValueError if nothing keeps to the limit, and as ``choose_workers`` does.
    """
    tokens, length = (gptq.tokens, gptq.length) if gptq else (0, 1)
    shapes, wanted = shapes_of(job, decoder), choose_workers(workers, job.experts.numel)

    def peak(number: int, some: int) -> int:
        return peak_bytes(shapes, number, some, length, propagated)

    allowed = limit if limit is not None else available_bytes()
    if allowed is None or peak(wanted, tokens) <= allowed or (limit is None and workers is not None):
        return Fitted(wanted, tokens, peak(wanted, tokens))
    number = next((number for number in range(wanted, 1, -1) if peak(number, tokens) <= allowed), 1)
    fewest = tokens if fixed or limit is None else min(tokens, max(TOKENS, length))
    some = next((some for some in range(tokens, fewest, -length) if peak(number, some) <= allowed), fewest)
    if limit is not None and (least := peak(number, some)) > limit:
        raise ValueError(
            f"`memory`: expected at least {format_bytes(least)} for this model, got {format_bytes(limit)}: allow more, "
            "or convert with `effort=0`, which runs nothing"
        )
    parts = [f"{number} of {wanted} workers"] if number < wanted else []
    parts += [f"{some} of {tokens} tokens"] if some < tokens else []
    less = f"{' and '.join(parts)}, to keep to {format_bytes(allowed)} of memory" if parts else ""
    return Fitted(number, some, peak(number, some), less)
