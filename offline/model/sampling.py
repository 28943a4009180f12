"""Drawing tokens from what a model predicts, in little memory, on all cores.

A vocabulary has many more words than a hidden state has features, so predictions are never held for many places, and
never read more often than need be: sums over blocks of words tell in which block a token lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from offline.progress import Progress
from offline.threads import in_threads

# Predictions held at a time; words that a thread predicts at a time, whole blocks; and words in a block.
MAX_PREDICTIONS, SLICE, BLOCK = 2**26, 2**13, 2**7


@torch.no_grad()
def draw(
    places: Tensor,
    shares: Tensor,
    head: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    workers: int = 1,
    softcap: float | None = None,
    known: Tensor | None = None,
    record: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Tokens drawn from ``softmax((places @ head.T + bias) / scaling)``, ``[places, draws]``.

    places: ``[places, hidden_size]`` float32; shares: ``[places, draws]`` float64 in [0, 1), random: a token is the
    first with whose probability those of all before it add up to more; head: ``[words, hidden_size]``, any floating
    dtype; workers: threads to use, which changes no token; softcap: what a hyperbolic tangent bends logits to, if any;
    record: called with the tokens of as many places as are held together; known: those that it was called with before.
    Raises ValueError for predictions that are not finite.
    """
    count, drawn = predictions_held(len(head)), [] if known is None else [known.to(places.device)]
    done = sum(map(len, drawn))
    with Progress("text", places.nbytes, places[:done].nbytes, brief=True) as progress:
        for some, wanted in zip(places[done:].split(count), shares[done:].split(count), strict=True):
            drawn.append(_draw(some, wanted, head, bias, scaling, workers, softcap))
            if record:
                record(drawn[-1])
            progress.advance(some.nbytes)
    return torch.cat(drawn)


def predictions_held(words: int) -> int:
    """The number of places whose predictions of so many words are held together."""
    return max(1, MAX_PREDICTIONS // _padded(words))


def _padded(words: int) -> int:
    """Words in whole blocks."""
    return math.ceil(words / BLOCK) * BLOCK


def _draw(
    places: Tensor,
    shares: Tensor,
    head: Tensor,
    bias: Tensor | None,
    scaling: float,
    workers: int,
    softcap: float | None,
) -> Tensor:
    """``draw`` for places whose predictions are held together."""
    # What a token counts beside those of its slice, and 0 for words that there are not.
    odds = places.new_empty(len(places), _padded(len(head)))
    odds[:, len(head) :] = 0

    def predict(start: int) -> tuple[Tensor, Tensor]:
        """The greatest logit of a slice, and the sums of its blocks."""
        rows = slice(start, start + SLICE)
        logits = nn.functional.linear(places, head[rows].float(), None if bias is None else bias[rows].float())
        logits /= scaling
        if softcap:
            logits.div_(softcap).tanh_().mul_(softcap)
        greatest = logits.amax(-1, keepdim=True)
        odds[:, start : start + logits.shape[1]] = logits.sub_(greatest).exp_()
        return greatest, odds[:, rows].unflatten(1, (-1, BLOCK)).sum(-1)

    greatest, sums = zip(*in_threads(predict, range(0, len(head), SLICE), workers), strict=True)
    peak = torch.cat(greatest, 1).amax(-1, keepdim=True)
    if not peak.isfinite().all():
        raise ValueError(
            "expected a model that predicts tokens, got NaN from its last layer: compare its files and config.json "
            "with the original"
        )
    blocks = torch.cat([part * (top - peak).exp() for part, top in zip(sums, greatest, strict=True)], 1)
    block, rest = _pick(blocks, shares)
    within = odds.unflatten(1, (-1, BLOCK))[torch.arange(len(places), device=odds.device)[:, None], block]
    return block * BLOCK + _pick(within, rest[..., None])[0][..., 0]


def _pick(odds: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Where along the sum of ``odds``, ``[..., n]``, shares of it, ``[..., draws]``, lie; and how far along that one of
    the odds each lies.
    """
    odds = odds.double()
    ends = odds.cumsum(-1)
    # Never at the very end, behind which nothing lies.
    least = torch.zeros_like(ends[..., -1:])
    reached = torch.minimum(shares * ends[..., -1:], ends[..., -1:].nextafter(least))
    index = torch.searchsorted(ends, reached, right=True)
    there = odds.gather(-1, index)
    return index, ((reached - ends.gather(-1, index) + there) / there).clamp_(0, 1)
