"""Running a model layer by layer: the same activations as the whole model's, with one layer in memory."""

import pytest
import torch
import transformers

from offline.model.decoder import CALIBRATED, Decoder, add_outputs, advance, route
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts, load_weight

CPU = torch.device("cpu")


def expert_outputs(source, experts, layer, routes):
    outputs = torch.zeros_like(routes.inputs)
    for expert in range(experts.num_experts):
        matrices = [m for m in experts.matrices if (m.module, m.expert) == (layer.source_experts, expert)]
        gate, up, down = (load_weight(source, matrix) for matrix in matrices)
        tokens, weights = routes.of(expert)
        inputs = routes.inputs[tokens]
        outputs[tokens] += (layer.activation(inputs @ gate.T) * (inputs @ up.T)) @ down.T * weights[:, None]
    return outputs


def open_model(path):
    source = open_checkpoint(str(path))
    return source, find_experts(source)


@pytest.mark.parametrize("model_type", CALIBRATED)
def test_decoder_computes_what_transformers_computes(tiny_model, model_type):
    path = tiny_model(model_type)
    windows = torch.randint(3, 256, (3, 40), generator=torch.Generator().manual_seed(0))
    whole = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).get_decoder()
    whole.norm = torch.nn.Identity()
    with torch.no_grad():
        expected = whole(windows, use_cache=False).last_hidden_state

    source, experts = open_model(path)
    decoder = Decoder(source, experts)
    hidden = decoder.embed(source, windows, CPU)
    for layer in decoder.layers:
        with layer.loaded(source, CPU):
            if layer.source_experts:
                outputs = expert_outputs(source, experts, layer, route(layer, hidden))
                assert outputs.norm() > 1e-3 * hidden.norm()
                add_outputs(layer, hidden, outputs)
            else:
                advance(layer, hidden)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-6)
