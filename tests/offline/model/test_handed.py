"""What layers hand on besides hidden states: taken from one, kept, and given to the next."""

import inspect
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaDecoderLayer, GlmMoeDsaModel

from alphaq_vllm import convert
from offline.journal import Journal
from offline.model.decoder import Decoder
from offline.model.forward import forward
from offline.model.handed import Place, filled, keep, num_returned, places, restored, same
from offline.model.layer import route
from offline.model.passes import Pass, kept_nbytes
from offline.model.runnable import last_norm
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts
from tests.offline.conftest import COMMON, CONFIGS
from tests.offline.model.whole import whole_model

CPU = torch.device("cpu")


def whole_output(path, windows):
    """The output of the last layer by transformers."""
    decoder = whole_model(path).get_decoder()
    setattr(decoder, last_norm(decoder)[0], torch.nn.Identity())
    with torch.no_grad():
        return decoder(input_ids=windows, use_cache=False).last_hidden_state


@pytest.fixture(scope="module")
def windows():
    return torch.randint(3, 256, (3, 40), generator=torch.Generator().manual_seed(0))


def save_model(folder):
    """A GLM whose layers all have experts, with an indexer in the first and the fourth of five."""
    options = {**COMMON, **CONFIGS["glm_moe_dsa"], "num_hidden_layers": 5, "index_topk_freq": 3}
    # Large enough for the experts to matter.
    options |= {"first_k_dense_replace": 0, "initializer_range": 0.1}
    config = transformers.AutoConfig.for_model("glm_moe_dsa", **options)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    source = open_checkpoint(str(folder))
    experts = find_experts(source)
    return Decoder(source, experts), source, experts


def check(folder, decoder, source, experts, windows):
    hidden = forward(decoder, source, experts, windows, "text", workers=2)
    expected = whole_output(folder, windows)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_what_one_layer_chooses_reaches_all_that_share_it(tmp_path, windows):
    decoder, source, experts = save_model(tmp_path)
    assert [layer.module.self_attn.indexer is None for layer in decoder.layers] == [False, True, True, False, True]
    check(tmp_path, decoder, source, experts, windows)
    assert [layer.takes for layer in decoder.layers] == [[], *([Place(number, 1)] for number in range(4))]
    # Nothing is held when its layer is done.
    assert not any(layer.handed for layer in decoder.layers)


def test_what_is_kept_on_disk_is_known_before_it_is(tmp_path, windows):
    decoder, source, _ = save_model(tmp_path / "model")
    journal = Journal(tmp_path / "journal")
    run = Pass(decoder, "text", journal)
    sizes = set()
    for layer in run.layers(hidden := run.begin(source, windows)):
        with layer.loaded(source, CPU):
            route(layer, hidden)
        sizes.add(sum(file.stat().st_size for file in (tmp_path / "kept").glob("*")))
    # Eight of 40 tokens are chosen for each, and their numbers take four bytes.
    expected = windows.numel() * (128 * 4 + 8 * 4)
    assert kept_nbytes(decoder, source, windows.numel(), 40) == 2 * expected
    assert 0 in sizes
    assert all(expected <= size < expected + 1000 for size in sizes - {0})


def test_what_depends_on_the_experts_is_handed_on_when_they_are_done(tmp_path, windows, monkeypatch):
    """Then a layer runs twice, as if it did more with what comes out of its experts than to add it."""
    own = GlmMoeDsaDecoderLayer.forward

    def forward_(self, *positional, **named):
        hidden, chosen = own(self, *positional, **named)
        return hidden, (chosen + (hidden[..., :1] > 0)) % hidden.shape[1]

    monkeypatch.setattr(GlmMoeDsaDecoderLayer, "forward", forward_)
    decoder, source, experts = save_model(tmp_path)
    check(tmp_path, decoder, source, experts, windows)
    # What comes out of the last goes nowhere.
    assert [layer.scale for layer in decoder.layers] == [None, None, None, None, 1]


def test_indexers_that_no_layer_uses_are_kept(tiny_model, tmp_path):
    """Published checkpoints have one for every layer, and vLLM leaves out those that it does not use."""
    plain, full = tiny_model("glm_moe_dsa"), tmp_path / "full"
    tensors = load_file(shutil.copytree(plain, full) / "model.safetensors")
    unused = {name.replace(".0.", ".1."): t.clone() for name, t in tensors.items() if ".0.self_attn.indexer." in name}
    assert unused
    assert not unused.keys() & tensors.keys()
    save_file(tensors | unused, full / "model.safetensors", {"format": "pt"})
    converted = {}
    for source in (plain, full):
        out = tmp_path / f"{source.name}-out"
        summary = convert(source, out, bits=3.0, group_size=64, calibration_tokens=256, calibration_length=64)
        assert (summary.quantizer, summary.noise) == ("gptq", "propagated")
        (weights,) = out.glob("*.safetensors")
        converted[source] = load_file(weights)
    assert converted[full].keys() == converted[plain].keys() | unused.keys()
    assert all(torch.equal(converted[full][name], tensor) for name, tensor in (converted[plain] | unused).items())


def test_layers_are_refused_that_take_what_an_earlier_one_returned(tmp_path, windows, monkeypatch):
    def forward_(self, inputs_embeds, **_):
        """As of a decoder that hands every layer what the first has returned."""
        hidden, first = self.layers[0](inputs_embeds, prev_topk_indices=None)
        for layer in self.layers[1:]:
            hidden, _ = layer(hidden, prev_topk_indices=first)
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=hidden)

    decoder, source, _ = save_model(tmp_path)
    monkeypatch.setattr(GlmMoeDsaModel, "forward", forward_)
    with pytest.raises(ValueError, match="layer 2: expected to be called with what layer 1 returns, got what layer 0"):
        decoder.embed(source, windows, CPU)
    with pytest.raises(ValueError, match=r"config\.json: expected a config with which .* run the model, got .*layer 2"):
        decoder.rehearse(source)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("hidden_states = decoder_layer(hidden_states)", 1),
        ("hidden_states = layer(hidden_states, a=b, c=d)", 1),
        ("hidden_states, indices = decoder_layer(hidden_states)", 2),
        ("hidden_states, indices, = layer(hidden_states)", 2),
        ("x, a, b = self.layer(x)", 1),
        ("x, a, b = encoder_layer(\n                x,\n            )", 3),
    ],
)
def test_num_returned_is_read_in_the_decoders_code(monkeypatch, text, number):
    source = f"    def forward(self):\n        for layer in self.layers:\n            {text}\n"
    monkeypatch.setattr(inspect, "getsource", lambda _: source)
    assert num_returned(torch.nn.Identity()) == number


def test_places_are_found_and_filled_in_all_arguments():
    arguments = (None, [Place(0, 2)]), {"a": {"b": Place(0, 1)}, "c": 3}
    assert places(arguments) == [Place(0, 1), Place(0, 2)]
    assert filled(arguments, {1: "one", 2: None}) == ((None, [None]), {"a": {"b": "one"}, "c": 3})


def test_what_was_kept_is_restored(tmp_path):
    chosen = torch.arange(24, dtype=torch.int32).view(1, 6, 4)
    handed = {
        0: {1: chosen, 2: torch.tensor(True)},
        # Another shape, not contiguous, and nothing in one of the places.
        1: {1: chosen[:, :3].transpose(1, 2), 2: None},
    }
    keep(handed, tmp_path / "kept")
    found = restored(tmp_path / "kept", 2, [Place(5, 1), Place(5, 2)], CPU)
    assert all(same(handed[window], found[window]) for window in (0, 1))
    assert found[0][1].dtype == torch.int32
    assert found[1][2] is None
    assert not same(handed[0], found[1])
    assert not same({1: None}, {1: chosen})
