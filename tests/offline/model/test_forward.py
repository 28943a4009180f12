"""A whole model run layer by layer, and the text that it writes, against transformers."""

from pathlib import Path

import pytest
import torch
import transformers

from offline.model import text as text_module
from offline.model.decoder import CALIBRATED, Decoder
from offline.model.forward import forward
from offline.model.text import write_text
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts

DOCS_MOE = Path(__file__).parents[2] / "models" / "docs-moe"


def open_model(path):
    source = open_checkpoint(str(path))
    experts = find_experts(source)
    return Decoder(source, experts), source, experts


@torch.no_grad()
def logits(path, windows):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model(windows, use_cache=False).logits


@pytest.mark.parametrize("model_type", [*CALIBRATED, "latent"])
def test_sample_draws_from_the_predictions_of_transformers(tiny_model, latent_model, model_type, monkeypatch):
    path = latent_model if model_type == "latent" else tiny_model(model_type)
    windows = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    decoder, source, experts = open_model(path)
    drawn = []

    def most_likely(probabilities, count, generator):
        drawn.append(probabilities)
        return probabilities.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", most_likely)
    tokens = decoder.sample(source, forward(decoder, source, experts, windows, "text"), torch.Generator())
    expected = logits(path, windows).softmax(-1)
    torch.testing.assert_close(torch.cat(drawn).view_as(expected), expected, rtol=1e-3, atol=1e-6)
    assert tokens.shape == windows.shape


def test_write_text_gives_tokens_that_the_model_expects():
    text = write_text(*open_model(DOCS_MOE), tokens=512, length=64)
    assert text.shape == (8, 64)
    noise = torch.randint(1536, text.shape, generator=torch.Generator().manual_seed(1))

    def loss(windows):
        predicted = logits(DOCS_MOE, windows)[:, :-1]
        return torch.nn.functional.cross_entropy(predicted.flatten(0, 1), windows[:, 1:].flatten()).item()

    assert loss(text) < loss(noise) - 2


def test_write_text_is_the_same_on_every_run():
    texts = [write_text(*open_model(DOCS_MOE), tokens=64, length=32) for _ in range(2)]
    assert torch.equal(*texts)


def test_write_text_keeps_to_the_context_of_the_model(monkeypatch):
    monkeypatch.setattr(text_module, "PASSES", 0)
    assert write_text(*open_model(DOCS_MOE), tokens=4096, length=4096).shape == (4, 1024)
