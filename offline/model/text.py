"""Text to run a model on: a user's, or what the model writes itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from offline.journal import Journal
from offline.messages import reason
from offline.model.decoder import Decoder
from offline.model.forward import forward
from offline.model.passes import Pass
from offline.source.architectures import experts_per_token
from offline.source.checkpoint import Checkpoint
from offline.source.families import Experts

# For each input feature of the average expert: more than ``TOKENS_PER_FEATURE`` hardly help (benchmarks/results, preset
# tokens). What each takes grows with the size of experts, so that above ``MANY_TOKENS`` there are few a feature.
TOKENS_PER_FEATURE, FEW_PER_FEATURE = 32, 2
MANY_TOKENS, MAX_TOKENS = 32768, 65536
# Of ``write_text``: the tokens after which it asks the model for predictions, and its seed.
CONTEXT_TOKENS, SEED = 4096, 0
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken")


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on.

    files: of UTF-8 text, none for text of the model's own; tokens: at most so many of it, None for as many as
    ``default_tokens`` says, for each of which memory holds three vectors of the hidden size in float32; length: of a
    window, the tokens that the model sees together; times: of the default's tokens.
    """

    files: tuple[Path, ...] = ()
    tokens: int | None = None
    length: int = 512
    times: int = 1

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"`calibration_length`: expected a number of tokens from 1 up, got {self.length}")
        if self.tokens is not None and self.tokens < self.length:
            raise ValueError(
                f"`calibration_tokens`: expected at least the {self.length} of `calibration_length`, got {self.tokens}"
            )


def default_tokens(source: Checkpoint, experts: Experts, times: int = 1) -> int:
    """As many tokens as help to calibrate this model, in a time that is worth it, or in ``times`` of it."""
    routed = experts_per_token(source.config) / experts.num_experts
    for_each = experts.matrices[0].shape[1] / routed
    most = min(MAX_TOKENS, max(MANY_TOKENS, FEW_PER_FEATURE * for_each))
    return math.ceil(min(times * most, TOKENS_PER_FEATURE * for_each))


def read_windows(source: Checkpoint, calibration: Calibration, max_tokens: int) -> torch.Tensor:
    """Tokens of the text, by the source's own tokenizer: ``[windows, length]`` int64, spread evenly over all the text.

    max_tokens: at least a window.
    Raises ValueError or OSError for text that cannot be read or is shorter than a window, and for a source without
    tokenizer or with a shorter context than a window.
    """
    context = source.config.get("max_position_embeddings")
    if isinstance(context, int) and calibration.length > context:
        raise ValueError(
            f"`calibration_length`: expected at most the {context} tokens of max_position_embeddings in config.json, "
            f"got {calibration.length}"
        )
    tokens = torch.tensor(_tokenize(source, [_read(file) for file in calibration.files]))
    windows = tokens[: len(tokens) // calibration.length * calibration.length].view(-1, calibration.length)
    if not len(windows):
        raise ValueError(
            f"`calibration`: expected at least {calibration.length} tokens of text, got {len(tokens)}: "
            "give more text or lower `calibration_length`"
        )
    count = min(len(windows), max_tokens // calibration.length)
    return windows[torch.arange(count) * len(windows) // count]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`calibration`: {file}: expected UTF-8 text, got {error}") from error


def _tokenize(source: Checkpoint, texts: list[str]) -> list[int]:
    from transformers import AutoTokenizer

    way_out = "download the tokenizer's files or use another quantizer"
    # Without any of them transformers makes an empty tokenizer for some models.
    if not any(file for pattern in _VOCABULARIES for file in source.path.glob(pattern)):
        raise ValueError(f"{source.path}: expected a tokenizer for the calibration text, got none: {way_out}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:
        # Settings of other types fail anywhere in transformers, and the library below it raises nothing narrower.
        raise ValueError(
            f"{source.path}: expected a tokenizer for the calibration text, got {type(error).__name__}: "
            f"{reason(error):.200}: {way_out}"
        ) from error
    return [token for text in texts for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def write_text(
    decoder: Decoder,
    source: Checkpoint,
    experts: Experts,
    tokens: int,
    length: int,
    workers: int = 1,
    journal: Journal | None = None,
) -> torch.Tensor:
    """Text of the model's own, for what needs text where the user has none: ``[windows, length]`` token ids.

    It starts from random tokens. A pass runs the model once and replaces every token by one that the model predicts
    after those before it, all places at once. That is not the text that it would write word by word, which would take a
    pass for every word, but its tokens are as frequent and call on the experts as often as in real text. A first pass
    makes the contexts, and the second draws from what the model predicts in each of them as often as need be, for a
    prediction costs much more than a draw.

    workers: threads to use, which changes no token; journal: where tokens are kept as they are drawn, and found again,
    and so are the passes. Fewer tokens are the beginning of what more of them would be.
    """
    length = min(length, decoder.context)
    count = max(1, tokens // length)
    contexts = min(count, max(1, CONTEXT_TOKENS // length))
    generators = [torch.Generator().manual_seed(SEED + number) for number in range(contexts)]
    windows = torch.stack([torch.randint(decoder.vocab_size, (length,), generator=each) for each in generators])
    for number, draws in enumerate((1, math.ceil(count / contexts))):
        shares = [torch.rand(draws, length, generator=each, dtype=torch.float64).T for each in generators]
        run = Pass(decoder, f"text-{count}x{length}-{number}", journal, output=True)
        drawn = _draw(decoder, source, experts, windows, torch.stack(shares), run, workers, journal).permute(2, 0, 1)
        windows = torch.cat((windows[:, :1].expand(draws, -1, -1), drawn[:, :, :-1]), 2).flatten(0, 1)
    return windows[:count]


def _draw(
    decoder: Decoder,
    source: Checkpoint,
    experts: Experts,
    windows: torch.Tensor,
    shares: torch.Tensor,
    run: Pass,
    workers: int,
    journal: Journal | None,
) -> torch.Tensor:
    """``Decoder.sample`` after a pass, but for tokens that are in the journal."""
    parts = [entry["tokens"] for entry in journal.entries if entry.get("text") == run.name] if journal else []
    known = torch.tensor([tokens for part in parts for tokens in part], dtype=torch.int64).view(-1, shares.shape[-1])
    if run.finished:
        return known.view(shares.shape)

    def record(tokens: torch.Tensor) -> None:
        if journal:
            journal.record({"text": run.name, "tokens": tokens.tolist()})

    hidden = forward(decoder, source, experts, windows, "text", workers=workers, run=run)
    drawn = decoder.sample(source, hidden, shares, workers, known, record)
    run.finish()
    return drawn
