"""Real servers on models that are not quantized: vLLM quantizes them while it loads them."""

import json

import pytest
import torch

from benchmarks.fidelity import reference_logprobs, served_logprobs, windows
from benchmarks.server import vllm_server
from tests.conftest import MODEL, run_alphaq
from tests.serving.comparison import TEXT, TWO_RANKS_ON_CPUS

SETTINGS = {"bits": 3.5, "group_size": 64}
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
        environment = {"ALPHAQ_CACHE": str(cache), **(TWO_RANKS_ON_CPUS if "2" in arguments else {})}
        with vllm_server(model, [*ARGUMENTS, *arguments], log=log, environment=environment) as url:
            return served_logprobs(url, windows(MODEL, TEXT, 1024)), log.read_text()

    return serve


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The checkpoint that conversion makes of the model with the same settings."""
    out = tmp_path_factory.mktemp("converted") / "checkpoint"
    options = ["--bits", "3.5", "--group-size", "64", "--noise", "expert", "--quantizer", "mse"]
    run_alphaq("convert", MODEL, out, *options)
    return out


def test_ranks_answer_like_the_dequantized_checkpoint(logprobs, converted, cache, tmp_path):
    """Ranks of experts, of which each quantizes its own."""
    ranks = ["--tensor-parallel-size", "2", "--enable-expert-parallel"] if torch.cuda.device_count() != 1 else []
    served, log = logprobs(MODEL, "--dtype", DTYPE, "--enforce-eager", *ranks, *overrides(**SETTINGS))
    run_alphaq("dequantize", converted, tmp_path / "dequantized", "--dtype", "float32")
    expected = reference_logprobs(tmp_path / "dequantized", windows(MODEL, TEXT, 1024), torch.float32)
    assert len(expected) > 1000
    # In bfloat16, which GPUs are asked for, vLLM and transformers differ on any model.
    assert (served - expected).abs().mean() <= (0.05 if DTYPE == "bfloat16" else 1e-4)
    (statistics,) = cache.glob("*.csv")
    assert f"and saved in {statistics}" in log
    assert "72 expert matrices at 3.5000 bits on average (3.7500 as stored)" in log


@pytest.mark.long
def test_server_answers_like_the_converted_checkpoint(logprobs, converted, cache):
    expected, _ = logprobs(converted, "--dtype", DTYPE)
    served, _ = logprobs(MODEL, "--dtype", DTYPE, *overrides(**SETTINGS))
    assert (served - expected).abs().max() <= 1e-5
    if torch.cuda.device_count() == 1:
        pytest.skip("needs 2 GPUs")
    served, log = logprobs(MODEL, "--dtype", DTYPE, "--tensor-parallel-size", "2", *overrides(**SETTINGS))
    assert (served - expected).abs().max() <= 1e-3
    (statistics,) = cache.glob("*.csv")
    assert f"statistics reused from {statistics}" in log
    assert "and saved in" not in log


@pytest.mark.long
def test_server_refuses_wrong_settings_before_weights_load(tmp_path):
    """tests/plugin/test_online.py has all of them, without a server."""
    log = tmp_path / "log"
    with (
        pytest.raises(RuntimeError, match="vllm serve ended with status"),
        vllm_server(MODEL, [*ARGUMENTS, *overrides(bits=9)], log=log),
    ):
        pass
    assert "`bits`: expected an average from 2 to 4" in log.read_text()
    assert "EngineCore" not in log.read_text()
