"""Running a model layer by layer: the same activations as the whole model's, with one layer in memory."""

import json
import shutil
from functools import partial

import pytest
import torch
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from offline.model.decoder import Decoder
from offline.model.forward import forward, run_experts
from offline.model.layer import Outputs, advance, route
from offline.model.runnable import can_run, last_norm, text_decoder
from offline.source.architectures import FAMILIES
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts, load_weight
from tests.offline.conftest import WEIGHTS_ONLY
from tests.offline.model.whole import whole_model

CPU = torch.device("cpu")


def open_model(path):
    source = open_checkpoint(str(path))
    return source, find_experts(source)


@pytest.mark.parametrize("model_type", [*(name for name in FAMILIES if name not in WEIGHTS_ONLY), "latent"])
def test_decoder_computes_what_transformers_computes(tiny_model, latent_model, model_type):
    path = latent_model if model_type == "latent" else tiny_model(model_type)
    windows = torch.randint(3, 256, (3, 40), generator=torch.Generator().manual_seed(0))
    whole = text_decoder(whole_model(path))
    setattr(whole, last_norm(whole)[0], torch.nn.Identity())
    with torch.no_grad():
        expected = whole(input_ids=windows, use_cache=False).last_hidden_state

    source, experts = open_model(path)
    decoder = Decoder(source, experts)
    hidden = decoder.embed(source, windows, CPU)
    for layer in decoder.layers:
        with layer.loaded(source, CPU):
            if not layer.source_experts:
                advance(layer, hidden)
                continue
            routes = route(layer, hidden)
        rest, outputs = hidden.clone(), Outputs(layer, hidden, routes)
        run_experts(experts.of(layer.source_experts), partial(load_weight, source), routes, outputs)
        outputs.finish(source)
        # Unless they are normalized, they have to be large enough to matter.
        assert layer.scale is None or (hidden - rest).norm() > 1e-3 * rest.norm()
    # Activations of the latent model are larger.
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-6 * max(1, float(expected.abs().max())))


def test_the_class_that_another_program_has_for_a_config_does_not_count(tiny_model, monkeypatch):
    """As in a process of vLLM's, where a model is quantized while it is loaded."""
    source, _ = open_model(tiny_model("kimi_linear"))
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "kimi_linear", PretrainedConfig)
    assert can_run(source)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_cannot_be_run_is_known_beforehand(tiny_model, model_type):
    source, experts = open_model(tiny_model(model_type))
    assert can_run(source) == (model_type not in WEIGHTS_ONLY)
    if model_type in WEIGHTS_ONLY:
        with pytest.raises(ValueError, match=f"which cannot be done with {model_type}: .*: leave both out"):
            Decoder(source, experts)


def test_weighted_inputs_of_several_experts_are_not_run(tiny_model, tmp_path):
    """What reaches them could not be told by token; serving needs one expert for each token there, too."""
    path = shutil.copytree(tiny_model("llama4_text"), tmp_path / "model")
    config = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 2}))
    source, experts = open_model(path)
    assert not can_run(source)
    with pytest.raises(ValueError, match="its router scales the inputs of several experts for each token: leave both"):
        Decoder(source, experts)


@pytest.mark.parametrize(
    ("model_type", "scales"),
    [
        ("qwen2_moe", [1, 1]),
        ("llama4_text", [1, 1]),
        ("cohere2_moe", [0.5, 0.5]),
        ("gemma4_text", [None, None]),
        ("granitemoe", [0.22, 0.22]),
    ],
)
def test_what_a_layer_does_with_its_experts_is_found(tiny_model, tmp_path, model_type, scales):
    """Also the multiplier of Granite, and that Gemma normalizes."""
    path = shutil.copytree(tiny_model(model_type), tmp_path / "model")
    if model_type == "granitemoe":
        config = json.loads((path / "config.json").read_bytes())
        (path / "config.json").write_text(json.dumps({**config, "residual_multiplier": 0.22}))
    source, experts = open_model(path)
    decoder = Decoder(source, experts)
    forward(decoder, source, experts, torch.arange(3, 43)[None], "text")
    assert [layer.scale for layer in decoder.layers] == scales
