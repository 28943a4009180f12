"""Text, not perplexity alone: what vLLM generates from mixed widths is what the dequantized model generates.

Mixed widths within a layer have passed perplexity and failed generation elsewhere.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.server import vllm_server

MODEL = Path(__file__).parents[1] / "models" / "docs-moe"
PROMPTS = [
    "The Python standard library",
    "This module provides",
    "A",
    "class Queue:\n\n    def put(self, item):",
    "Changed in version 3.11:",
    "If the file does not exist, an OSError is raised. Otherwise the method returns a list of names. For example:",
    "See also the function",
    "42",
]
TOKENS = 160
# float32 on both sides: they differ by 1e-6 in the mean. On GPUs only 16 bits are served.
DTYPE, BOUND = ("float16", 0.1) if torch.cuda.is_available() else ("float32", 0.001)


@pytest.fixture(scope="module")
def served(mixed_checkpoint, tmp_path_factory):
    """By temperature, for each prompt: its ids, the generated ids, and their log-probabilities from the server."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ["--quantization", "alphaq", "--dtype", DTYPE, "--max-model-len", "512"]

    with vllm_server(mixed_checkpoint, arguments, log=log) as base_url:
        client = OpenAI(base_url=base_url, api_key="none")

        def generate(prompt, temperature):
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            options = {"return_tokens_as_token_ids": True, "ignore_eos": True}
            response = client.completions.create(
                model=str(mixed_checkpoint),
                prompt=ids,
                max_tokens=TOKENS,
                temperature=temperature,
                seed=0,
                logprobs=1,
                extra_body=options,
            )
            logprobs = response.choices[0].logprobs
            generated = [int(token.removeprefix("token_id:")) for token in logprobs.tokens]
            return ids, generated, torch.tensor(logprobs.token_logprobs)

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            return {
                temperature: list(pool.map(partial(generate, temperature=temperature), PROMPTS))
                for temperature in (0, 1)
            }


@torch.inference_mode()
def disagreements(path, served):
    """The greatest difference of log-probabilities, and by how much a generated token is worse than the best one."""
    net = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    difference = worse = 0.0
    for ids, generated, logprobs in served:
        expected = net(torch.tensor([ids + generated])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(generated)[:, None])[:, 0]
        difference = max(difference, float((chosen - logprobs).abs().max()))
        worse = max(worse, float((expected.amax(1) - chosen).max()))
    return difference, worse


def test_greedy_text_is_that_of_the_dequantized_model(served, dequantized_checkpoint):
    assert all(len(generated) == TOKENS for _, generated, _ in served[0])
    difference, worse = disagreements(dequantized_checkpoint, served[0])
    assert difference <= BOUND
    # Where two tokens are closer than that, either is right.
    assert worse <= 2 * BOUND


def test_sampled_text_has_the_probabilities_of_the_dequantized_model(served, dequantized_checkpoint):
    """Greedy text of a small model goes round in circles; this goes everywhere."""
    assert all(len(set(generated)) > TOKENS / 3 for _, generated, _ in served[1])
    difference, worse = disagreements(dequantized_checkpoint, served[1])
    assert difference <= BOUND
    assert worse > 1


def test_generated_text_is_not_that_of_the_original_model(served):
    """The tests above tell models apart."""
    for generated in served.values():
        assert disagreements(MODEL, generated)[0] > 100 * BOUND
    assert disagreements(MODEL, served[0])[1] > 100 * BOUND
