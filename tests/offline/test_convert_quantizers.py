"""Conversion with each quantizer: what is stored, measured and reported is that quantizer's; GPTQ stops and resumes."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from alphaq_vllm import convert, validate
from offline.layerwise import sequential
from offline.model.text import Calibration, default_tokens
from offline.operations.dequantize import dequantize
from offline.quantizers.quantize import quantization_mse, quantize
from offline.sensitivity.stats import read_statistics
from offline.source.checkpoint import open_checkpoint
from offline.source.families import ExpertMatrix, find_experts, load_weight
from offline.threads import one_thread
from offline.writing import writer
from tests.offline.model.whole import whole_model

DOCS_MOE = Path(__file__).parents[1] / "models" / "docs-moe"
UNIFORM = {"bits": 2.0, "mode": "uniform", "quantizer": "mse"}


@pytest.fixture
def calibration(text):
    return {"calibration": [text], "calibration_tokens": 256, "calibration_length": 64}


def stored(out):
    return {name: tensor for file in sorted(out.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("quantizer", ["rtn", "hqq", "mse"])
@one_thread()
def test_convert_stores_and_measures_its_quantizer(tiny_model, tmp_path, quantizer):
    source, out = open_checkpoint(str(tiny_model("qwen2_moe"))), tmp_path / "out"
    summary = convert(source.path, out, bits=3.0, noise="measured", quantizer=quantizer)
    tensors, statistics = stored(out), read_statistics(out / "alphaq_stats.csv")
    bits = json.loads((out / "config.json").read_bytes())["quantization_config"]["num_bits"]
    for matrix, measured in zip(find_experts(source).matrices, statistics.matrices, strict=True):
        weight = load_weight(source, matrix)
        num_bits = int(bits[matrix.module][matrix.projection][matrix.expert])
        for name, tensor in quantize(weight, num_bits, 64, quantizer).tensors(matrix.name).items():
            assert torch.equal(tensors[name], tensor)
        assert list(measured.mse.values()) == quantization_mse(weight, (2, 3, 4), 64, quantizer)
    assert summary.quantizer == statistics.origin.quantizer == quantizer
    assert f"- quantizer: {quantizer}\n" in (out / "README.md").read_text()
    assert f"quantizer:      {quantizer}\n" in str(summary)
    assert validate(str(out), str(source.path))["matrices"] == 24


def test_convert_refuses_statistics_of_another_quantizer(tiny_model, tmp_path):
    path = str(tiny_model("qwen2_moe"))
    convert(path, tmp_path / "out", bits=3.0, noise="measured", quantizer="mse")
    stats = tmp_path / "out" / "alphaq_stats.csv"
    with pytest.raises(ValueError, match="out of date: quantizer: expected rtn, got mse"):
        convert(path, tmp_path / "rtn", bits=3.0, noise="measured", quantizer="rtn", stats=stats)
    convert(path, tmp_path / "rtn", bits=3.0, noise="analytic", quantizer="rtn", stats=stats)


def test_convert_accepts_statistics_of_its_quantizer(tiny_model, tmp_path, alphaq):
    path, stats = tiny_model("qwen2_moe"), tmp_path / "stats.csv"
    assert alphaq("measure", path, "-o", stats, "--quantizer", "rtn", "--noise", "measured")[0] == 0
    assert alphaq("measure", path, "-o", stats, "--quantizer", "hqq")[0] == 2
    assert alphaq("convert", path, tmp_path / "out", "--quantizer", "rtn", "--stats", stats)[0] == 0
    convert(path, tmp_path / "measured", noise="expert", quantizer="rtn")
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "measured").keys()
    one, two = stored(tmp_path / "out"), stored(tmp_path / "measured")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_convert_with_gptq_stores_its_results(speaking_model, tmp_path, text, calibration):
    path = speaking_model("qwen2_moe")
    source, out = open_checkpoint(str(path)), tmp_path / "out"
    summary = convert(path, out, bits=3.0, noise="measured", group_size=64, quantizer="gptq", **calibration)
    statistics = read_statistics(out / "alphaq_stats.csv")
    assert statistics.origin.quantizer == "mse"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (summary.quantizer, summary.calibration_tokens, summary.starved) == ("gptq", 256, 0)
    assert "gptq, calibrated on 256 tokens; 0 of 8 experts saw none of them" in str(summary)
    assert "- quantizer: gptq, calibrated on 256 tokens\n" in (out / "README.md").read_text()

    experts = find_experts(source)
    spec = json.loads((out / "config.json").read_bytes())["quantization_config"]["num_bits"]
    bits = {m.name: int(spec[m.module][m.projection][m.expert]) for m in experts.matrices}
    results = {}
    gptq = sequential.SequentialGptq(source, experts, Calibration((text,), tokens=256, length=64))
    gptq.run(bits, 64, results.update)
    tensors = stored(out)
    assert len(results) == 3 * len(experts.matrices)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in results.items())
    assert validate(str(out), str(path))["matrices"] == 24


def test_convert_with_gptq_calibrates_on_the_models_own_text_without_any(tmp_path):
    results = []
    for name, (tokens, length) in (("a", (512, 64)), ("b", (64, 32))):
        summary = convert(
            DOCS_MOE,
            tmp_path / name,
            bits=3.0,
            noise="measured",
            quantizer="gptq",
            calibration_tokens=tokens,
            calibration_length=length,
        )
        assert (summary.own_text, summary.calibration_tokens) == (True, tokens)
        card = (tmp_path / name / "README.md").read_text()
        assert f"- quantizer: gptq, calibrated on {tokens} tokens that the model wrote itself\n" in card
        results.append(stored(tmp_path / name))
    assert any(not torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_convert_by_propagated_noise_keeps_the_gains(tmp_path, alphaq):
    stats, out, again, bit_map = (tmp_path / name for name in ("stats.csv", "out", "again", "map.json"))
    assert alphaq("measure", DOCS_MOE, "-o", stats)[0] == 0
    options = ["--bits", "2.5", "--gamma", "0"]
    status, printed, _ = alphaq("convert", DOCS_MOE, out, *options)
    assert status == 0
    assert "alphaq, propagated noise" in printed
    assert "the errors that quantization causes on text that the model wrote itself" in (out / "README.md").read_text()
    assert (out / "alphaq_stats.csv").read_text() == stats.read_text()
    assert alphaq("convert", DOCS_MOE, again, *options, "--stats", stats)[0] == 0
    assert alphaq("allocate", stats, *options, "-o", bit_map)[0] == 0
    config, same = (json.loads((path / "config.json").read_bytes()) for path in (out, again))
    assert config == same
    digits = config["quantization_config"]["num_bits"]["model.layers.0.mlp.experts"]["gate_proj"]
    assert int(digits[5]) == json.loads(bit_map.read_bytes())["model.layers.0.mlp.experts.5.gate_proj"]
    # A third of all tokens go to this expert, few to the one after.
    assert int(digits[5]) > int(digits[6])


def test_command_runs_the_model_where_it_can(speaking_model, tiny_model, tmp_path, alphaq):
    status, printed, _ = alphaq("convert", speaking_model("mixtral"), tmp_path / "run", "--json")
    assert status == 0
    summary = json.loads(printed)
    assert (summary["quantizer"], summary["own_text"], summary["noise"]) == ("gptq", True, "propagated")
    # 32 for each of 128 input features, of which a token reaches two experts' out of four.
    assert summary["calibration_tokens"] == 8192
    status, printed, _ = alphaq("convert", tiny_model("deepseek_v4"), tmp_path / "not", "--json")
    assert status == 0
    summary = json.loads(printed)
    assert (summary["quantizer"], summary["calibration_tokens"], summary["noise"]) == ("mse", 0, "expert")


def test_without_effort_nothing_runs_the_model(tmp_path, alphaq):
    by_hand = convert(DOCS_MOE, tmp_path / "by-hand", noise="expert", quantizer="mse")
    status, printed, _ = alphaq("convert", DOCS_MOE, tmp_path / "out", "--effort", "0", "--json")
    assert status == 0
    summary = json.loads(printed)
    assert (summary["quantizer"], summary["noise"], summary["calibration_tokens"]) == ("mse", "expert", 0)
    assert summary["widths"] == {str(width): number for width, number in by_hand.widths.items()}
    assert contents(tmp_path / "out") == contents(tmp_path / "by-hand")
    # What is named is done all the same.
    gptq = convert(DOCS_MOE, tmp_path / "gptq", effort=0, quantizer="gptq", dry_run=True)
    assert (gptq.quantizer, gptq.noise) == ("gptq", "expert")


def test_more_effort_takes_more_text_where_experts_are_large():
    def tokens(hidden, num_experts, top_k, times):
        matrix = ExpertMatrix("experts", 0, "gate_proj", (1, hidden))
        experts = SimpleNamespace(num_experts=num_experts, matrices=[matrix])
        source = SimpleNamespace(config={"num_experts": num_experts, "num_experts_per_tok": top_k})
        return default_tokens(source, experts, times)

    # Of 32 for each feature of docs-moe's experts there are enough.
    assert [tokens(128, 8, 2, times) for times in (1, 4)] == [16384, 16384]
    # Qwen1.5-MoE has 2, Mixtral 2 and DeepSeek-V3 0.3.
    assert [tokens(2048, 60, 4, times) for times in (1, 4)] == [61440, 245760]
    assert [tokens(4096, 8, 2, times) for times in (1, 4)] == [32768, 131072]
    assert [tokens(7168, 256, 8, times) for times in (1, 4)] == [65536, 262144]


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text", "llama4", "kimi_linear", "glm_moe_dsa"])
def test_running_the_model_brings_predictions_closer_to_the_sources(tiny_model, tmp_path, model_type):
    source = tiny_model(model_type)
    windows = torch.randint(3, 256, (8, 64), generator=torch.Generator().manual_seed(0))

    def predict(path):
        with torch.no_grad():
            return whole_model(path)(input_ids=windows, use_cache=False).logits.double().log_softmax(-1)

    def divergence(name, **options):
        summary = convert(source, tmp_path / name, bits=3.0, group_size=64, **options)
        dequantize(tmp_path / name, tmp_path / f"{name}-dequantized")
        return (exact.exp() * (exact - predict(tmp_path / f"{name}-dequantized"))).sum(-1).mean(), summary

    exact = predict(source)
    default, summary = divergence("default")
    assert (summary.quantizer, summary.noise, summary.own_text) == ("gptq", "propagated", True)
    weights_only, _ = divergence("weights", noise="expert", quantizer="mse")
    assert 0 < default < 0.9 * weights_only


def test_propagated_noise_needs_statistics_that_have_it(tmp_path, alphaq):
    stats = tmp_path / "stats.csv"
    assert alphaq("measure", DOCS_MOE, "-o", stats, "--noise", "measured")[0] == 0
    status, _, error = alphaq("allocate", stats, "--noise", "propagated", "-o", tmp_path / "map.json")
    assert status == 2
    assert "expected the column gain for --noise propagated, got none: measure again with --noise propagated" in error


def test_convert_with_gptq_leaves_excluded_layers_alone(speaking_model, tmp_path, calibration):
    path, out = speaking_model("qwen2_moe"), tmp_path / "out"
    options = {**UNIFORM, "quantizer": "gptq", **calibration}
    summary = convert(path, out, **options, exclude=["*.layers.0.*"])
    assert (summary.layers, summary.matrices) == (1, 12)
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    assert torch.equal(stored(out)[name], load_file(path / "model.safetensors")[name])


# Two layers of four experts; a complete layer is not done again.
@pytest.mark.parametrize(("calls_before", "calls_after"), [(0, 8), (5, 4), (8, 0)])
def test_convert_with_gptq_resumes_to_the_same_bytes(
    speaking_model, tmp_path, calibration, monkeypatch, calls_before, calls_after
):
    path, quantize_expert, calls = str(speaking_model("qwen2_moe")), sequential._quantize, []
    write_piece = writer._write_piece
    options = {**UNIFORM, "quantizer": "gptq", **calibration}
    convert(path, tmp_path / "whole", **options)

    def fail_late(task):
        calls.append(task)
        if len(calls) > calls_before:
            raise OSError(errno.ENOSPC, "No space left on device")
        return quantize_expert(task)

    monkeypatch.setattr(sequential, "_quantize", fail_late)
    if calls_before == 8:
        monkeypatch.setattr(writer, "_write_piece", fail_late)
    with pytest.raises(OSError, match=r"No space left.*`resume`"):
        convert(path, tmp_path / "out", **options)
    with pytest.raises(ValueError, match=r"quantizer = .*gptq.*, not .*mse"):
        convert(path, tmp_path / "out", **UNIFORM, resume=True)
    other = {**calibration, "calibration_tokens": 128}
    with pytest.raises(ValueError, match=r"calibration = .*, not "):
        convert(path, tmp_path / "out", resume=True, **{**options, **other})
    calls.clear()
    monkeypatch.setattr(writer, "_write_piece", write_piece)
    monkeypatch.setattr(sequential, "_quantize", lambda task: calls.append(task) or quantize_expert(task))
    convert(path, tmp_path / "out", **options, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()
    assert len(calls) == calls_after


def test_convert_with_gptq_and_dry_run_writes_nothing(speaking_model, tmp_path, calibration):
    path = str(speaking_model("qwen2_moe"))
    summary = convert(path, tmp_path / "out", **{**UNIFORM, "quantizer": "gptq", **calibration}, dry_run=True)
    assert (summary.calibration_tokens, summary.starved) == (256, None)
    assert summary.seconds > 0
    assert "gptq, calibrated on 256 tokens\n" in str(summary)
    assert not list(tmp_path.iterdir())


REFUSED = {
    "unknown": (["--quantizer", "awq"], "argument --quantizer: invalid choice: 'awq'"),
    "text for mse": (
        ["--quantizer", "mse", "--calibration", "TEXT"],
        "--calibration: expected --quantizer gptq, got mse",
    ),
    "tokens for mse": (
        ["--quantizer", "mse", "--calibration-tokens", "9999"],
        "--calibration: expected --quantizer gptq, got mse",
    ),
    "long windows": (
        ["--quantizer", "gptq", "--calibration", "TEXT", "--calibration-length", "40000"],
        "--calibration-length",
    ),
    "text missing": (
        ["--quantizer", "gptq", "--calibration", "nowhere.txt"],
        "No such file or directory: 'nowhere.txt'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_command_refuses_before_anything_is_written(speaking_model, tmp_path, text, alphaq, name):
    options, message = REFUSED[name]
    options = [text if option == "TEXT" else option for option in options]
    status, _, error = alphaq("convert", speaking_model("qwen2_moe"), tmp_path / "out", *options)
    assert status == 2
    assert message in error
    assert not list(tmp_path.iterdir())


def test_command_passes_the_calibration_on(speaking_model, tmp_path, text, alphaq):
    widths, calibration = ("--mode", "uniform", "--bits", 2), ("--calibration-tokens", 128, "--calibration-length", 64)
    options = (*widths, "--quantizer", "gptq", "--calibration", text, text, *calibration, "--json")
    status, output, _ = alphaq("convert", speaking_model("qwen2_moe"), tmp_path / "out", *options)
    assert (status, json.loads(output)["calibration_tokens"]) == (0, 128)


@pytest.mark.parametrize(
    "model_type", ["nemotron_h", "gemma4_text", "qwen3_next", "deepseek_v3", "gpt_oss", "glm_moe_dsa"]
)
def test_dry_run_expects_each_phase_that_a_conversion_has(tiny_model, tmp_path, model_type):
    dry = convert(tiny_model(model_type), tmp_path / "out", group_size=32, dry_run=True)
    done = convert(tiny_model(model_type), tmp_path / "out", group_size=32)
    assert list(dry.expected) == [phase for phase in done.phases if phase != "check"]
    assert all(seconds > 0 for phase, seconds in dry.expected.items() if phase != "write" or "gptq" not in dry.expected)
