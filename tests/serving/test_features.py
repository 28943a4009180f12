"""What users of vLLM combine with a quantization: adapters, speculation, cached prefixes."""

import json
import shutil
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.fidelity import reference_logprobs, windows
from benchmarks.server import vllm_server
from tests.serving.comparison import BOUND, DTYPE, TEXT, assert_faithful, disagreements, generate

RANK, SCALE = 8, 2.0
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_adapter(folder, dequantized):
    """An adapter on attention with random matrices, and the model with it merged."""
    (shard,) = dequantized.glob("*.safetensors")
    tensors = load_file(shard)
    generator = torch.Generator().manual_seed(0)
    adapter = {}
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        if not module.endswith(PROJECTIONS):
            continue
        a = torch.randn(RANK, weight.shape[1], generator=generator) * 0.05
        b = torch.randn(weight.shape[0], RANK, generator=generator) * 0.05
        adapter |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        tensors[name] = weight + SCALE * b @ a
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK * SCALE, "target_modules": list(PROJECTIONS)}
    config |= {"bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": "model"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    merged = Path(shutil.copytree(dequantized, folder / "merged"))
    save_file(tensors, merged / shard.name, {"format": "pt"})
    return folder / "adapter", merged


@pytest.fixture(scope="module")
def merged(dequantized_checkpoint, tmp_path_factory):
    """An adapter, and the dequantized model with it merged."""
    return write_adapter(tmp_path_factory.mktemp("adapter"), dequantized_checkpoint)


@pytest.fixture(scope="module")
def server(mixed_checkpoint, merged, tmp_path_factory):
    """The base URL of a server that has all of them at once."""
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    arguments = ["--quantization", "alphaq", "--dtype", DTYPE, "--max-model-len", "1024", "--enforce-eager"]
    arguments += ["--enable-prefix-caching", "--speculative-config", json.dumps(speculation)]
    arguments += ["--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", f"adapter={merged[0]}"]
    arguments += ["--lora-target-modules", *PROJECTIONS]
    log = tmp_path_factory.mktemp("server") / "log"
    with vllm_server(mixed_checkpoint, arguments, log=log) as base_url:
        yield base_url


def test_log_probabilities_are_those_of_the_dequantized_model(server, dequantized_checkpoint):
    assert_faithful(server, dequantized_checkpoint)


def test_adapter_on_attention(server, merged, dequantized_checkpoint):
    assert_faithful(server, merged[1], "adapter")
    prompts = windows(dequantized_checkpoint, TEXT, 512)
    with_it, without = (
        reference_logprobs(model, prompts, torch.float32) for model in (merged[1], dequantized_checkpoint)
    )
    assert (with_it - without).abs().mean() > 0.1


def test_cached_prefixes_and_speculation_change_no_token(server, dequantized_checkpoint):
    (prompt, *_) = windows(dequantized_checkpoint, TEXT, 512)
    answers = [generate(server, prompt, 48) for _ in range(2)]
    assert answers[0][1] == answers[1][1]
    difference, worse = disagreements(dequantized_checkpoint, answers)
    assert difference <= BOUND
    assert worse <= 2 * BOUND
    metrics = counters(server)
    assert metrics["vllm:prefix_cache_hits_total"] > 0
    assert metrics["vllm:spec_decode_num_accepted_tokens_total"] > 0


def counters(base_url):
    with urllib.request.urlopen(base_url.removesuffix("/v1") + "/metrics", timeout=60) as response:
        lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
    return {line.split("{")[0].split(" ")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
