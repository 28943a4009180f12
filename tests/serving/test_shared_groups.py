"""Two ranks that share 11 groups of 128 columns, which is what Qwen1.5-MoE has, or 5 experts, in a real server."""

import json

import pytest
import torch
import transformers

from alphaq_vllm import convert
from benchmarks.fidelity import measure
from tests.conftest import MODEL
from tests.serving.comparison import TEXT, TWO_RANKS_ON_CPUS

INTERMEDIATE = 11 * 128
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def save_model(folder):
    """A small Qwen2-MoE with experts, and a shared expert, of true width."""
    vocab_size = json.loads((MODEL / "config.json").read_bytes())["vocab_size"]
    config = transformers.Qwen2MoeConfig(
        vocab_size=vocab_size, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_experts=5, num_experts_per_tok=2, moe_intermediate_size=INTERMEDIATE,
        shared_expert_intermediate_size=INTERMEDIATE, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER:
        (folder / name).write_bytes((MODEL / name).read_bytes())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for CPUs, where all is computed in float32")
@pytest.mark.parametrize("options", [[], ["--enable-expert-parallel"]], ids=["eleven-groups", "five-experts"])
def test_two_ranks_share_what_is_odd(options, tmp_path):
    model, checkpoint = tmp_path / "model", tmp_path / "checkpoint"
    save_model(model)
    # The shared expert's down projection is cut too.
    convert(model, checkpoint, mode="uniform", bits=4, quantizer="mse", group_size=128, linear_bits=8, tp_size=2)
    arguments = ["--tensor-parallel-size", "2", "--enforce-eager", *options]
    result = measure(checkpoint, TEXT, 2048, "float32", arguments, work=tmp_path, environment=TWO_RANKS_ON_CPUS)
    assert result.tokens > 2000
    assert result.max_abs_difference <= 0.001
