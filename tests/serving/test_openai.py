"""One real server, compiled, with linear layers quantized too: everything that is asked of it over HTTP."""

import asyncio
import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from transformers import AutoTokenizer

from alphaq_vllm import convert
from benchmarks import load
from benchmarks.server import vllm_server
from tests.conftest import run_alphaq
from tests.serving.comparison import assert_faithful

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "models" / "docs-moe"
TEXT = (ROOT / "LICENSE").read_text()
CLIENTS = 64
PROMPTS = [TEXT[100 * i : 100 * i + 40 + i] for i in range(CLIENTS)]
ON_GPU = torch.cuda.is_available()
NATIVE = r"the native CPU kernel \(\w+\)"
EXPERTS, LINEAR = ("Triton kernels", r"(Marlin|Machete)\w*") if ON_GPU else (NATIVE, NATIVE)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The base URL, and the log, beside which the checkpoint lies."""
    folder = tmp_path_factory.mktemp("server")
    bits = {"gate_proj": 2, "up_proj": 3, "down_proj": 4}
    config = json.loads((MODEL / "config.json").read_bytes())
    widths = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}": width
        for layer in range(config["num_hidden_layers"])
        for expert in range(config["num_experts"])
        for name, width in bits.items()
    }
    convert(
        MODEL,
        folder / "checkpoint",
        bit_map=widths,
        group_size=64,
        linear_bits=4,
        quantizer="mse",
    )
    # Fewer tokens of KV cache than many clients want at once, so that requests wait and are preempted.
    blocks = ["--num-gpu-blocks-override", str(CLIENTS * 3 // 2), "--max-model-len", str(load.MAX_LENGTH)]
    arguments = ["--quantization", "alphaq", "--dtype", "float16", "--max-num-seqs", str(CLIENTS), *blocks]
    if ON_GPU:
        arguments.append("--enable-sleep-mode")
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    with vllm_server(folder / "checkpoint", arguments, log=folder / "log", environment=environment) as base_url:
        yield base_url, folder / "log"


def requests_of(base_url):
    client = OpenAI(base_url=base_url, api_key="none")
    options = {"model": client.models.list().data[0].id, "max_tokens": 24, "temperature": 0.0}
    return client, options


def complete(base_url, prompt):
    client, options = requests_of(base_url)
    answer = client.completions.create(prompt=prompt, **options)
    assert answer.usage.completion_tokens == 24
    return answer.choices[0].text


def logprobs(base_url, prompt):
    client, options = requests_of(base_url)
    return torch.tensor(
        client.completions.create(prompt=prompt, logprobs=1, **options).choices[0].logprobs.token_logprobs
    )


def post(base_url, path, body=None):
    url = base_url.removesuffix("/v1") + path
    request = urllib.request.Request(url, json.dumps(body or {}).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        assert response.status == 200
        return json.loads(response.read() or b"null")


def test_log_probabilities_are_those_of_the_dequantized_model(server, tmp_path):
    # bfloat16 would bury small faults: on this model two programs differ by 0.03 without any quantization.
    run_alphaq("dequantize", server[1].with_name("checkpoint"), tmp_path / "dequantized", "--dtype", "float16")
    assert_faithful(server[0], tmp_path / "dequantized", dtype=torch.float16, bound=0.01, length=load.MAX_LENGTH // 2)


def test_streamed_completion_is_that_of_one_answer(server):
    client, options = requests_of(server[0])
    stream = client.completions.create(prompt=PROMPTS[0], stream=True, **options)
    pieces = [chunk.choices[0].text for chunk in stream]
    assert len(pieces) > 1
    assert "".join(pieces) == complete(server[0], PROMPTS[0])
    assert "".join(pieces).strip()


def test_concurrent_requests_are_answered_as_one_at_a_time(server):
    alone = [complete(server[0], prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(CLIENTS) as pool:
        together = list(pool.map(lambda prompt: complete(server[0], prompt), PROMPTS))
    assert len(set(alone)) > CLIENTS // 2
    assert together == alone


def test_clients_that_hang_up_and_send_nonsense_change_no_answer(server):
    ids = AutoTokenizer.from_pretrained(MODEL)(TEXT, add_special_tokens=False)["input_ids"]
    result = asyncio.run(load.run(server[0], requests_of(server[0])[1]["model"], ids, CLIENTS, seconds=5, seed=0))
    print(result.figures())
    result.check(bound=0.05)
    assert result.requests.keys() == load.SHARES.keys()
    assert result.compared_tokens > 10 * CLIENTS


def test_log_says_once_what_was_loaded_and_what_runs_it(server):
    lines = [line for line in server[1].read_text().splitlines() if "AlphaQ: " in line]
    loaded, kernels = (line.split("AlphaQ: ")[1] for line in lines)
    pattern = (
        r"loaded \d+ expert matrices of \d+ layers at 3\.00 bits per weight \(widths 2, 3, 4\), \d+\.\d MiB with .*"
    )
    assert re.fullmatch(pattern, loaded)
    assert re.fullmatch(rf"experts on {EXPERTS}; \d+ linear layers on {LINEAR}", kernels)


def test_weights_are_reloaded_in_place(server):
    before = logprobs(server[0], PROMPTS[1])
    post(server[0], "/collective_rpc", {"method": "reload_weights"})
    assert "Reloading weights inplace" in server[1].read_text()
    assert torch.equal(logprobs(server[0], PROMPTS[1]), before)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="vLLM sleeps on GPUs only")
@pytest.mark.parametrize("level", [1, 2])
def test_server_answers_alike_after_sleep(server, level):
    before = logprobs(server[0], PROMPTS[2])
    post(server[0], f"/sleep?level={level}")
    post(server[0], "/wake_up")
    if level == 2:
        # Level 2 forgets the weights.
        post(server[0], "/collective_rpc", {"method": "reload_weights"})
    assert torch.equal(logprobs(server[0], PROMPTS[2]), before)
