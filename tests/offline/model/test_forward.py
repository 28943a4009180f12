"""A whole model run layer by layer, and the text that it writes, against transformers."""

from pathlib import Path

import pytest
import torch

from offline.model import text as text_module
from offline.model.decoder import Decoder
from offline.model.forward import forward
from offline.model.text import write_text
from offline.source.architectures import FAMILIES
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts
from tests.offline.conftest import WEIGHTS_ONLY
from tests.offline.model.whole import whole_model

DOCS_MOE = Path(__file__).parents[2] / "models" / "docs-moe"


def open_model(path):
    source = open_checkpoint(str(path))
    experts = find_experts(source)
    return Decoder(source, experts), source, experts


@torch.no_grad()
def logits(path, windows):
    return whole_model(path)(input_ids=windows, use_cache=False).logits


@pytest.mark.parametrize("model_type", [*(name for name in FAMILIES if name not in WEIGHTS_ONLY), "latent"])
def test_sample_draws_from_the_predictions_of_transformers(tiny_model, latent_model, model_type):
    path = latent_model if model_type == "latent" else tiny_model(model_type)
    windows = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    decoder, source, experts = open_model(path)
    shares = torch.rand(2, 40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = decoder.sample(source, forward(decoder, source, experts, windows, "text"), shares)
    expected = torch.searchsorted(logits(path, windows).double().softmax(-1).cumsum(-1), shares)
    # Rounding moves the ends of tokens a little.
    assert (tokens == expected).double().mean() > 0.99


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_next", "deepseek_v2"])
def test_forward_and_sample_give_the_same_on_any_number_of_threads(tiny_model, model_type):
    decoder, source, experts = open_model(tiny_model(model_type))
    windows = torch.randint(3, 256, (5, 40), generator=torch.Generator().manual_seed(0))
    shares = torch.rand(5, 40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden = [forward(decoder, source, experts, windows, "text", workers=workers) for workers in (1, 2, 3)]
    assert torch.equal(hidden[0], hidden[1])
    assert torch.equal(hidden[0], hidden[2])
    assert torch.equal(*(decoder.sample(source, hidden[0], shares, workers) for workers in (1, 3)))


def test_write_text_gives_tokens_that_the_model_expects():
    text = write_text(*open_model(DOCS_MOE), tokens=512, length=64)
    assert text.shape == (8, 64)
    noise = torch.randint(1536, text.shape, generator=torch.Generator().manual_seed(1))

    def loss(windows):
        predicted = logits(DOCS_MOE, windows)[:, :-1]
        return torch.nn.functional.cross_entropy(predicted.flatten(0, 1), windows[:, 1:].flatten()).item()

    assert loss(text) < loss(noise) - 2


def test_write_text_is_the_same_on_every_run_and_on_any_number_of_threads():
    texts = [write_text(*open_model(DOCS_MOE), tokens=64, length=32, workers=workers) for workers in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


def test_less_text_is_the_beginning_of_more(monkeypatch):
    monkeypatch.setattr(text_module, "CONTEXT_TOKENS", 128)
    longest = write_text(*open_model(DOCS_MOE), tokens=650, length=32)
    assert longest.shape == (20, 32)
    assert len(longest.unique(dim=0)) == 20
    for tokens in (40, 64, 128, 300):
        text = write_text(*open_model(DOCS_MOE), tokens=tokens, length=32)
        assert torch.equal(text, longest[: tokens // 32])


def test_write_text_keeps_to_the_context_of_the_model():
    assert write_text(*open_model(DOCS_MOE), tokens=2048, length=4096).shape == (2, 1024)
