"""How far a language model's predictions are from those of the model that it was made from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import alphaq_vllm.transformers  # noqa: F401 - has transformers load its checkpoints

# Logits held at a time.
MAX_LOGITS = 2**27


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: np.ndarray) -> Estimate:
        """Estimate from one value per token."""
        return cls(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))))


@dataclass(frozen=True)
class Score:
    """A model against its reference on the same tokens, token by token.

    loss: nats a token; loss_increase: over the reference's; kl: of the reference's distribution from this one, in nats;
    top1: share of tokens that both hold most likely.
    """

    tokens: int
    loss: float
    loss_increase: Estimate
    kl: Estimate
    top1: Estimate

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss)


def windows(model: Path, texts: Sequence[str], tokens: int, context: int) -> torch.Tensor:
    """Tokens of the texts, ``[windows, context + 1]``, for about ``tokens`` predictions: each text gives as many
    whole windows, spread evenly over it, or all that it has.

    Raises ValueError if no text fills a window.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    share = max(1, round(tokens / context / len(texts)))
    rows = []
    for text in texts:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) > context:
            every = ids.unfold(0, context + 1, context)
            rows += list(every[torch.linspace(0, len(every) - 1, min(share, len(every))).round().long()])
    if not rows:
        raise ValueError(f"--text: expected over {context} tokens in a file, got fewer: lower --context")
    return torch.stack(rows)


def load_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A model for inference, on the GPU if there is one."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def predictions(model: PreTrainedModel, tokens: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities, ``[predictions, vocabulary]`` float32, and the tokens that came, some windows at a time."""
    context = tokens.shape[1] - 1
    batch = max(1, MAX_LOGITS // (context * model.config.get_text_config().vocab_size))
    for rows in tokens.to(model.device).split(min(batch, 16)):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        yield logits.float().flatten(0, 1).log_softmax(-1), rows[:, 1:].flatten()


class Reference:
    """Predictions of a reference model, kept in a file: ``tokens * vocabulary`` float32."""

    def __init__(self, model: PreTrainedModel, tokens: torch.Tensor, file: Path) -> None:
        self.tokens = tokens
        shape = (tokens[:, 1:].numel(), model.config.get_text_config().vocab_size)
        self.logprobs = np.memmap(file, np.float32, "w+", shape=shape)
        losses, start = [], 0
        for logprobs, targets in predictions(model, tokens):
            self.logprobs[start : start + len(logprobs)] = logprobs.cpu()
            losses.append(-logprobs.gather(1, targets[:, None])[:, 0].cpu())
            start += len(logprobs)
        self.losses = torch.cat(losses).double().numpy()

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(self.losses.mean())

    def score(self, model: PreTrainedModel) -> Score:
        """Compare another model with this one."""
        losses, kls, agree, start = [], [], [], 0
        for logprobs, targets in predictions(model, self.tokens):
            ours = torch.from_numpy(self.logprobs[start : start + len(logprobs)]).to(logprobs.device)
            losses.append(-logprobs.gather(1, targets[:, None])[:, 0].cpu())
            kls.append((ours.exp() * (ours - logprobs)).sum(-1).cpu())
            agree.append((ours.argmax(-1) == logprobs.argmax(-1)).cpu())
            start += len(logprobs)
        loss, kl, top1 = (torch.cat(parts).double().numpy() for parts in (losses, kls, agree))
        return Score(len(loss), float(loss.mean()), Estimate.of(loss - self.losses), Estimate.of(kl), Estimate.of(top1))
