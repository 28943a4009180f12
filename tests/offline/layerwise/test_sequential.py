"""GPTQ of a whole model: better on its calibration text, one layer at a time, the same on every run, and refusals."""

import itertools
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from alphaq_vllm import packing
from alphaq_vllm.format import GRID, PACKED, SCALE
from offline.journal import Journal
from offline.layerwise import sequential
from offline.layerwise.sequential import SequentialGptq
from offline.model.text import Calibration, read_windows
from offline.quantizers.quantize import quantize, scales_of
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts, load_weight
from offline.threads import one_thread
from tests.conftest import MODEL


@pytest.fixture
def calibration(text):
    return Calibration((text,), tokens=1024, length=64)


@pytest.fixture
def speaker(speaking_model, tmp_path):
    """A copy of the tiny Qwen2-MoE with a tokenizer, to be damaged."""
    return shutil.copytree(speaking_model("qwen2_moe"), tmp_path / "model")


def open_model(path):
    source = open_checkpoint(str(path))
    return source, find_experts(source)


def every_width(experts):
    widths = itertools.cycle((2, 3, 1, 4, 8))
    return {matrix.name: next(widths) for matrix in experts.matrices}


def run(path, calibration, stored, widths=None, **options):
    source, experts = open_model(path)
    widths = widths or every_width(experts)
    return SequentialGptq(source, experts, calibration).run(widths, 64, stored.update, **options)


def restore(stored, matrix, num_bits):
    return packing.dequantize(*(stored[f"{matrix.name}.{suffix}"] for suffix in (PACKED, SCALE, GRID)), num_bits)


def write_dequantized(path, source, experts, results, widths):
    """A copy of the source, in float32, with the quantized experts."""
    tensors = {name: source.load(name).float() for name in source.tensors}
    for matrix in experts.matrices:
        stored = tensors[matrix.tensor]
        place = matrix.fused.view(stored[matrix.expert]) if matrix.fused else stored
        place.copy_(restore(results, matrix, widths[matrix.name]))
    shutil.copytree(source.path, path, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def inputs_of(arguments):
    """What experts are called with, for each token; Llama-4's for one expert after another, all but one zeros."""
    return arguments[0] if len(arguments) > 1 else arguments[0].unflatten(0, (4, -1)).sum(0)


@pytest.mark.parametrize(
    ("model_type", "num_bits"),
    [("qwen2_moe", 2), ("qwen2_moe", 3), ("nemotron_h", 3), ("gpt_oss", 3), ("llama4_text", 3)],
)
@one_thread()
def test_gptq_changes_the_output_of_experts_less_than_the_data_free_quantizer(
    speaking_model, calibration, tmp_path, monkeypatch, model_type, num_bits
):
    path, seen, stored = speaking_model(model_type), [], {}
    route = sequential.route
    monkeypatch.setattr(sequential, "route", lambda *arguments: seen.append(route(*arguments)) or seen[-1])
    source, experts = open_model(path)
    run(path, calibration, stored, {matrix.name: num_bits for matrix in experts.matrices})
    for expert in range(experts.num_experts):
        places = [(matrix.module, matrix.expert) for matrix in experts.matrices]
        first = (experts.modules[0], expert)
        matrices = [matrix for matrix, place in zip(experts.matrices, places, strict=True) if place == first]
        inputs = seen[0].inputs[seen[0].of(expert)[0]]

        formula = seen[0].formula.of(expert)

        def outputs(weights, inputs=inputs, formula=formula):
            *first, down = weights
            return formula.project(formula.inner(inputs, first), down, torch.ones(len(inputs)))

        originals = [load_weight(source, matrix) for matrix in matrices]
        plain = [quantize(weight, num_bits, 64) for weight in originals]
        data_free = [packing.dequantize(q.packed, q.scale, q.grid, num_bits) for q in plain]
        calibrated = [restore(stored, matrix, num_bits) for matrix in matrices]
        error, before = ((outputs(w) - outputs(originals)).norm() for w in (calibrated, data_free))
        assert error < 0.6 * before


@pytest.mark.parametrize(
    "model_type", ["qwen2_moe", "mixtral", "deepseek_v2", "granitemoe", "nemotron_h", "gpt_oss", "llama4_text"]
)
def test_layers_are_calibrated_on_what_the_quantized_model_computes(
    speaking_model, calibration, tmp_path, monkeypatch, model_type
):
    path, seen, stored = speaking_model(model_type), [], {}
    route = sequential.route
    monkeypatch.setattr(sequential, "route", lambda *arguments: seen.append(route(*arguments)) or seen[-1])
    source, experts = open_model(path)
    widths = every_width(experts)
    run(path, calibration, stored, widths)
    model = write_dequantized(tmp_path / "plain", source, experts, stored, widths)
    expected = []
    for name, module in model.named_modules():
        if name.split(".")[-1] == "experts":
            module.register_forward_pre_hook(lambda module, arguments: expected.append(inputs_of(arguments)))
    with torch.no_grad():
        for window in read_windows(source, calibration, calibration.tokens):
            model(window[None])
    layers = len(seen)
    assert layers == len(experts.modules)
    for layer, routes in enumerate(seen):
        torch.testing.assert_close(routes.inputs, torch.cat(expected[layer::layers]), rtol=1e-4, atol=1e-5)


@one_thread()
def test_down_is_fitted_to_what_quantized_gate_and_up_give_it_by_router_weights(monkeypatch):
    """Experts of a trained model are nearer to what they were than without that."""
    source, experts = open_model(MODEL)
    seen, counted = [], []
    route, back = sequential.route, sequential.feedback
    monkeypatch.setattr(sequential, "route", lambda *arguments: seen.append(route(*arguments)) or seen[-1])
    monkeypatch.setattr(sequential, "feedback", lambda *given: counted.append(given[2]) or back(*given))

    def error():
        stored = {}
        seen.clear()
        run(MODEL, Calibration(tokens=4096, length=512), stored, {matrix.name: 3 for matrix in experts.matrices})
        total = 0.0
        for expert, matrices in enumerate(experts.of(experts.modules[0])):
            tokens, topk_weights = seen[0].of(expert)
            inputs, formula = seen[0].inputs[tokens], seen[0].formula.of(expert)
            now, before = (
                formula.project(formula.inner(inputs, first), down, topk_weights)
                for *first, down in (
                    [restore(stored, matrix, 3) for matrix in matrices],
                    [load_weight(source, matrix) for matrix in matrices],
                )
            )
            total += float((now - before).square().sum())
        return total

    fitted = error()
    assert torch.equal(counted[0], seen[0].of(0)[1])
    monkeypatch.setattr(sequential, "pull", lambda weight, *_: torch.zeros(weight.shape[::-1]))
    assert fitted < 0.97 * error()


@one_thread()
def test_down_is_quantized_in_blocks_where_tokens_are_few(monkeypatch):
    monkeypatch.setattr("offline.quantizers.gptq._FEWEST", 64)
    generator = torch.Generator().manual_seed(0)
    weight, inner = torch.randn(40, 256, generator=generator), torch.randn(100, 256, generator=generator)
    drifted, counts = torch.randn(256, generator=generator), torch.ones(100)
    found = sequential._quantize_down(weight, 3, 64, inner, counts, drifted)
    scales = scales_of(weight, 3, 64)
    for number in range(4):
        columns = slice(64 * number, 64 * (number + 1))
        back, some = sequential.feedback(inner[:, columns], 64, counts), weight[:, columns]
        moved = sequential.pull(some, back, drifted[columns])
        alone = sequential.gptq(some, back, 3, 64, pull=moved, scales=scales)
        assert torch.equal(found.grid[:, number : number + 1], alone.grid)
        assert torch.equal(found.dequantize(3)[:, columns], alone.dequantize(3))


def test_an_expert_without_tokens_is_quantized_without_data_and_counted(
    speaking_model, calibration, tmp_path, monkeypatch
):
    path = shutil.copytree(speaking_model("deepseek_v3"), tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][2] = -100
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    source, experts = open_model(path)
    widths = every_width(experts)
    journal, stored = Journal(tmp_path / "journal"), {}
    assert run(path, calibration, stored, widths, journal=journal) == 1
    journal.close()
    with monkeypatch.context() as patch:
        # A run that is finished is not run again, and still tells what it counted.
        patch.delattr(sequential, "route")
        assert run(path, calibration, {}, widths, journal=Journal(tmp_path / "journal")) == 1
    for matrix in experts.matrices:
        plain = quantize(load_weight(source, matrix), widths[matrix.name], 64).tensors(matrix.name)
        same = all(torch.equal(stored[name], plain[name]) for name in plain)
        assert same == (matrix.expert == 2)


def test_experts_that_are_left_alone_are_run_as_they_are(speaking_model, calibration, tmp_path, monkeypatch):
    path, seen, stored = speaking_model("qwen2_moe"), [], {}
    route = sequential.route
    monkeypatch.setattr(sequential, "route", lambda *arguments: seen.append(route(*arguments)) or seen[-1])
    widths = {name: bits for name, bits in every_width(open_model(path)[1]).items() if ".layers.1." in name}
    run(path, calibration, stored, widths)
    assert {name.rpartition(".")[0] for name in stored} == widths.keys()
    expected = []
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, arguments: expected.append(arguments[0]))
    with torch.no_grad():
        for window in read_windows(open_model(path)[0], calibration, calibration.tokens):
            model(window[None])
    torch.testing.assert_close(seen[1].inputs, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_memory_holds_the_weights_of_one_layer_and_no_experts(speaking_model, calibration, tmp_path, monkeypatch):
    route, checked = sequential.route, []
    source, experts = open_model(speaking_model("qwen2_moe"))
    gptq = SequentialGptq(source, experts, calibration)

    def check(layer, hidden, workers):
        for other in gptq.decoder.layers:
            real = {name for name, tensor in other.module.state_dict().items() if not tensor.is_meta}
            assert real == (set(layer.tensors) if other is layer else set())
            assert not any(".experts." in name for name in real)
        checked.append(layer)
        return route(layer, hidden, workers)

    monkeypatch.setattr(sequential, "route", check)
    gptq.run(every_width(experts), 64, {}.update)
    assert len(checked) == 2
    assert all(tensor.is_meta for layer in checked for tensor in layer.module.state_dict().values())


@pytest.mark.parametrize(("model_type", "workers"), [("qwen2_moe", 1), ("qwen2_moe", 2), ("gpt_oss", 2)])
def test_the_same_input_gives_the_same_bytes(speaking_model, calibration, model_type, workers):
    one, two = {}, {}
    for stored, number in ((one, 1), (two, workers)):
        run(speaking_model(model_type), calibration, stored, workers=number)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_windows_are_spread_over_the_whole_text(speaker, tmp_path):
    files = [tmp_path / name for name in ("a.txt", "b.txt")]
    for file, letter in zip(files, "ab", strict=True):
        file.write_text(letter * 100)
    source, _ = open_model(speaker)
    windows = read_windows(source, Calibration(tuple(files), length=16), 49)
    assert windows.shape == (3, 16)
    assert [len(window.unique()) for window in windows] == [1, 1, 1]
    assert windows[0, 0] != windows[2, 0]
    assert read_windows(source, Calibration(tuple(files), length=50), 10**6).shape == (4, 50)


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


REFUSED = {
    "no tokenizer": (
        lambda path, text: [file.unlink() for file in path.glob("tokenizer*")],
        "expected a tokenizer for the calibration text",
    ),
    "settings of a tokenizer in a list": (
        lambda path, text: (path / "tokenizer_config.json").write_text("[1]"),
        "expected a tokenizer for the calibration text, got AttributeError: .*: download the tokenizer's files",
    ),
    "a tokenizer of a number's class": (
        lambda path, text: (path / "tokenizer_config.json").write_text('{"tokenizer_class": 5}'),
        "expected a tokenizer for the calibration text, got AttributeError",
    ),
    "a tokenizer that is none": (
        lambda path, text: (path / "tokenizer.json").write_text("{}"),
        "expected a tokenizer for the calibration text, got",
    ),
    "too little text": (
        lambda path, text: text.write_text("few words"),
        "`calibration`: expected at least 64 tokens of text, got 9: give more text or lower `calibration_length`",
    ),
    "binary text": (
        lambda path, text: text.write_bytes(b"\xff" * 9000),
        r"`calibration`: .*text.txt: expected UTF-8 text",
    ),
    "text missing": (lambda path, text: text.unlink(), "No such file or directory: .*text.txt"),
    "short context": (
        lambda path, text: edit_config(path, max_position_embeddings=32),
        "`calibration_length`: expected at most the 32 tokens of max_position_embeddings",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_gptq_refuses_what_it_cannot_calibrate_on(speaker, text, tmp_path, name):
    damage, message = REFUSED[name]
    text = shutil.copy(text, tmp_path / "text.txt")
    damage(speaker, text)
    source, experts = open_model(speaker)
    with pytest.raises((ValueError, OSError), match=message):
        SequentialGptq(source, experts, Calibration((text,), tokens=1024, length=64))


def test_gptq_refuses_a_family_that_it_cannot_run(tiny_model, calibration):
    source, experts = open_model(tiny_model("deepseek_v4"))
    with pytest.raises(ValueError, match=r"cannot be done with deepseek_v4: .*: leave both out"):
        SequentialGptq(source, experts, calibration)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "`calibration_length`: expected a number of tokens from 1 up, got 0"),
        ({"tokens": 100}, "`calibration_tokens`: expected at least the 512 of `calibration_length`, got 100"),
    ],
)
def test_calibration_refuses_impossible_settings(text, settings, message):
    with pytest.raises(ValueError, match=message):
        Calibration(**{"files": (text,), **settings})
