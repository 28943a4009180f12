"""What users of vLLM combine with a quantization: adapters, speculation, cached prefixes."""

import json
import shutil
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.fidelity import compare, reference_logprobs, served_logprobs, windows
from benchmarks.server import vllm_server
from tests.serving.test_openai import post

TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()
DTYPE = "float16" if torch.cuda.is_available() else "float32"
SERVE = ["--quantization", "alphaq", "--dtype", DTYPE, "--max-model-len", "1024", "--enforce-eager"]
BOUND = 0.01 if torch.cuda.is_available() else 0.001
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


def test_adapter_on_attention(mixed_checkpoint, dequantized_checkpoint, tmp_path):
    adapter, merged = write_adapter(tmp_path, dequantized_checkpoint)
    prompts = windows(merged, TEXT, 1024)
    expected = reference_logprobs(merged, prompts, torch.float32)
    without = reference_logprobs(dequantized_checkpoint, prompts, torch.float32)
    arguments = [*SERVE, "--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", f"adapter={adapter}"]
    arguments += ["--lora-target-modules", *PROJECTIONS]
    with vllm_server(mixed_checkpoint, arguments, log=tmp_path / "log") as base_url:
        served = served_logprobs(base_url, prompts, model="adapter")
    assert compare(without, expected).mean_abs_difference > 0.1
    assert compare(served, expected).mean_abs_difference <= BOUND


def test_cached_prefixes_and_speculation_change_no_token(mixed_checkpoint, tmp_path):
    (prompt, *_) = windows(mixed_checkpoint, TEXT, 512)
    body = {"prompt": prompt, "max_tokens": 48, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    answers, metrics = {}, {}
    for name, more in {
        "plain": ["--no-enable-prefix-caching"],
        "both": ["--enable-prefix-caching", "--speculative-config", json.dumps(speculation)],
    }.items():
        with vllm_server(mixed_checkpoint, [*SERVE, *more], log=tmp_path / name) as base_url:
            answers[name] = [post(base_url, "/v1/completions", body)["choices"][0] for _ in range(2)]
            metrics[name] = counters(base_url)
    tokens = [answer["logprobs"]["tokens"] for both in answers.values() for answer in both]
    assert all(other == tokens[0] for other in tokens)
    scores = [torch.tensor(answer["logprobs"]["token_logprobs"]) for both in answers.values() for answer in both]
    assert max((other - scores[0]).abs().max() for other in scores) <= BOUND
    assert metrics["both"]["vllm:prefix_cache_hits_total"] > 0
    assert metrics["both"]["vllm:spec_decode_num_accepted_tokens_total"] > 0


def counters(base_url):
    with urllib.request.urlopen(base_url.removesuffix("/v1") + "/metrics", timeout=60) as response:
        lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
    return {line.split("{")[0].split(" ")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
