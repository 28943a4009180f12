import pytest
import torch
import transformers

from alphaq_vllm import convert
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory):
    """A Qwen2-MoE of one layer and two experts, not to be changed."""
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, moe_intermediate_size=64, num_experts=2, num_experts_per_tok=1,
        shared_expert_intermediate_size=64,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tiny") / "source"
    transformers.Qwen2MoeForCausalLM(config).bfloat16().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_source, tmp_path_factory):
    """Its conversion to six widths, linear layers to four bits, not to be changed."""
    out = tmp_path_factory.mktemp("tiny") / "checkpoint"
    matrices = find_experts(open_checkpoint(str(tiny_source))).matrices
    bits = {matrix.name: 3 + i for i, matrix in enumerate(matrices)}
    convert(tiny_source, out, bit_map=bits, group_size=32, linear_bits=4, quantizer="mse")
    return out
