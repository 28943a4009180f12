"""What a server answers against the dequantized model in transformers."""

from pathlib import Path

import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM

from benchmarks.fidelity import compare, reference_logprobs, served_logprobs, windows

TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()
# float32 on both sides: they differ by 1e-6 in the mean. On GPUs only 16 bits are served.
DTYPE, BOUND, MEAN_BOUND = ("float16", 0.1, 0.01) if torch.cuda.is_available() else ("float32", 0.001, 0.001)

# vLLM would bind the ranks to memory nodes, of which there may be one; with more threads they would fight.
TWO_RANKS_ON_CPUS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def generate(base_url, ids, max_tokens, temperature=0):
    """The prompt's ids, those that a server generates, and their log-probabilities."""
    client = OpenAI(base_url=base_url, api_key="none")
    response = client.completions.create(
        model=client.models.list().data[0].id,
        prompt=ids,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=0,
        logprobs=1,
        extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
    )
    logprobs = response.choices[0].logprobs
    generated = [int(token.removeprefix("token_id:")) for token in logprobs.tokens]
    return ids, generated, torch.tensor(logprobs.token_logprobs)


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


def assert_faithful(base_url, dequantized, model=None, dtype=torch.float32, bound=MEAN_BOUND, length=512):
    """A server gives the log-probabilities of a text that the dequantized model has.

    model: the name of an adapter that the server has; bound: on the mean of the difference; length: of the windows
    that the text is cut into.
    """
    prompts = windows(dequantized, TEXT, 2048, length)
    expected = reference_logprobs(dequantized, prompts, dtype)
    result = compare(served_logprobs(base_url, prompts, model), expected)
    assert result.tokens > 2000
    assert result.mean_abs_difference <= bound
    assert result.perplexity_served == pytest.approx(result.perplexity_reference, rel=0.005)
