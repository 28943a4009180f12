"""Real servers on models that are not quantized: vLLM quantizes them while it loads them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.fidelity import served_logprobs, windows
from benchmarks.server import vllm_server
from tests.serving.loading_memory import EXPERTS, SIZE, loading_memory, save_wide_model

MODEL = Path(__file__).parents[1] / "models" / "docs-moe"
TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()
SETTINGS = {"bits": 3, "group_size": 64}
ARGUMENTS = ["--quantization", "alphaq", "--max-model-len", "1024", "--no-enable-prefix-caching"]
DTYPE = "bfloat16" if torch.cuda.is_available() else "float32"


def overrides(**settings):
    return ["--hf-overrides", json.dumps({"quantization_config": {"quant_method": "alphaq", **settings}})]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "alphaq"


@pytest.fixture(scope="module")
def logprobs(cache, tmp_path_factory):
    """``logprobs(model, *arguments)``: of the text, as a server gives them, and the server's log."""

    def serve(model, *arguments):
        log = tmp_path_factory.mktemp("server") / "log"
        environment = {"ALPHAQ_CACHE": str(cache)}
        if "2" in arguments:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
        with vllm_server(model, [*ARGUMENTS, *arguments], log=log, environment=environment) as url:
            return served_logprobs(url, windows(MODEL, TEXT, 1024)), log.read_text()

    return serve


@pytest.fixture(scope="module")
def converted(logprobs, tmp_path_factory):
    """The log-probabilities of the converted checkpoint."""
    out = tmp_path_factory.mktemp("converted") / "checkpoint"
    command = [sys.executable, "-m", "offline.convert", str(MODEL), str(out), "--bits", "3", "--group-size", "64"]
    subprocess.run([*command, "--noise", "measured", "--quantizer", "mse"], check=True)
    return logprobs(out, "--dtype", DTYPE)[0]


def test_server_answers_like_the_converted_checkpoint(logprobs, converted, cache):
    assert len(converted) > 1000
    served, log = logprobs(MODEL, "--dtype", DTYPE, *overrides(**SETTINGS))
    assert (served - converted).abs().max() <= 1e-5
    (statistics,) = cache.glob("*.csv")
    assert f"and saved in {statistics}" in log
    assert "72 expert matrices at 3.0000 bits on average (3.5000 as stored)" in log
    if torch.cuda.device_count() == 1:
        pytest.skip("needs 2 GPUs")
    served, log = logprobs(MODEL, "--dtype", DTYPE, "--tensor-parallel-size", "2", *overrides(**SETTINGS))
    assert (served - converted).abs().max() <= 1e-3
    assert f"statistics reused from {statistics}" in log
    assert "and saved in" not in log


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"bits": 9}, "--bits: expected an average from 2 to 4", id="bits"),
        pytest.param({"bit": 3}, "expected settings out of bits, ", id="unknown"),
    ],
)
def test_server_refuses_wrong_settings_before_weights_load(tmp_path, settings, message):
    log = tmp_path / "log"
    with (
        pytest.raises(RuntimeError, match="vllm serve ended with status"),
        vllm_server(MODEL, [*ARGUMENTS, *overrides(**settings)], log=log),
    ):
        pass
    assert message in log.read_text()
    assert "EngineCore" not in log.read_text()


def test_loading_takes_the_quantized_bytes_and_less_than_a_layer(mixed_checkpoint, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("measures the memory of a CPU")
    names, bit_map = save_wide_model(tmp_path / "model"), tmp_path / "bit_map.json"
    bit_map.write_text(json.dumps({name: 2 + i % 3 for i, name in enumerate(names)}))
    settings = {"quantization_config": {"quant_method": "alphaq", "bit_map": str(bit_map)}}
    peak, held = loading_memory(mixed_checkpoint, tmp_path / "model", skip_tokenizer_init=True, hf_overrides=settings)
    layer = 2 * EXPERTS * 3 * SIZE * SIZE
    assert held < 1.5 * layer
    assert 0.9 * held <= peak <= held + layer
