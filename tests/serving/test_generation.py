"""A server of every width, compiled: log-probabilities, and text, are those of the dequantized model.

Mixed widths within a layer have passed perplexity and failed generation elsewhere.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from transformers import AutoTokenizer

from benchmarks.server import vllm_server
from tests.conftest import MODEL
from tests.serving.comparison import BOUND, DTYPE, assert_faithful, disagreements, generate

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


@pytest.fixture(scope="module")
def server(mixed_checkpoint, tmp_path_factory):
    """The base URL."""
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ["--quantization", "alphaq", "--dtype", DTYPE, "--max-model-len", "1024", "--no-enable-prefix-caching"]
    with vllm_server(mixed_checkpoint, arguments, log=log) as base_url:
        yield base_url


@pytest.fixture(scope="module")
def served(server):
    """By temperature, for each prompt: its ids, the generated ids, and their log-probabilities from the server."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompts = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return {
            temperature: list(pool.map(partial(generate, server, max_tokens=TOKENS, temperature=temperature), prompts))
            for temperature in (0, 1)
        }


def test_log_probabilities_are_those_of_the_dequantized_model(server, dequantized_checkpoint):
    assert_faithful(server, dequantized_checkpoint)


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
