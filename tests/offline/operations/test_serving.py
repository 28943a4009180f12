"""What a conversion takes of each GPU, beside what is computed from its tensors by hand."""

import math
from dataclasses import replace

import pytest

from alphaq_vllm.format import matrix_tensors
from offline.operations.plan import Job
from offline.operations.serving import Gpus, cache_bytes_per_token, divide, parse_gpus
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts
from offline.source.linear import choose_formats, find_linear_layers

BITS = 3


@pytest.fixture(scope="module")
def job(tiny_model):
    """The tiny Qwen2-MoE: experts 128 wide, 4 heads of attention, as if with 2 of keys and values."""
    source = open_checkpoint(str(tiny_model("qwen2_moe")))
    source = replace(source, config={**source.config, "num_key_value_heads": 2})
    return Job("model", source, find_experts(source))


def expert_bytes(job, ranks, group_size):
    """Of a rank of tensor parallelism that sees down's columns in groups of ``group_size``."""
    total = 0
    for matrix in job.experts.matrices:
        out_features, in_features = matrix.shape
        if matrix.projection == "down_proj":
            specs = matrix_tensors(out_features, in_features // ranks, BITS, group_size)
        else:
            specs = matrix_tensors(out_features // ranks, in_features, BITS, job.group_size)
        total += sum(spec.nbytes for spec in specs.values())
    return total


def other_bytes(job, ranks):
    replaced = {matrix.tensor for matrix in job.experts.matrices}
    total = 0
    for name in set(job.source.tensors) - replaced:
        whole = name.endswith(("norm.weight", "mlp.gate.weight", "shared_expert_gate.weight"))
        # Two heads of keys and values: four ranks have a copy each.
        share = min(ranks, 2) if ".k_proj." in name or ".v_proj." in name else ranks
        total += job.source.spec(name).nbytes // (1 if whole else share)
    return total


@pytest.mark.parametrize(("ranks", "group_size"), [(1, 64), (2, 64), (4, 32)])
def test_ranks_of_tensor_parallelism_hold_their_shares(job, ranks, group_size):
    divided = divide(job, BITS, ranks, "tensor")
    assert divided.group_size == group_size
    assert divided.weights == expert_bytes(job, ranks, group_size) + other_bytes(job, ranks)


def test_one_rank_holds_what_conversion_writes(job):
    assert divide(job, BITS, 1, "tensor").weights == job.bytes_at(BITS)


def test_a_rank_of_expert_parallelism_holds_whole_experts(job):
    experts = job.experts.num_experts
    for ranks in (2, 4):
        held = expert_bytes(job, 1, 64) * math.ceil(experts / ranks) // experts
        divided = divide(job, BITS, ranks, "expert")
        assert (divided.weights, divided.group_size) == (held + other_bytes(job, ranks), 64)


def test_quantized_linear_layers_take_less(job):
    linear = choose_formats(find_linear_layers(job.source, job.experts), 8, 128)
    smaller = divide(Job("model", job.source, job.experts, linear=linear), BITS, 2, "tensor").weights
    assert smaller < divide(job, BITS, 2, "tensor").weights


@pytest.mark.parametrize(
    ("ranks", "parallel", "message"),
    [
        (3, "expert", "4 heads of attention cannot be shared by 3 ranks"),
        (8, "tensor", "4 heads of attention cannot be shared by 8 ranks"),
    ],
)
def test_divide_refuses(job, ranks, parallel, message):
    with pytest.raises(ValueError, match=message):
        divide(job, BITS, ranks, parallel)


@pytest.mark.parametrize(
    ("config", "ranks", "expected"),
    [
        # Qwen1.5-MoE-A2.7B, on one and on two ranks.
        ({"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 2048}, 1, 196608),
        ({"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 2048}, 2, 98304),
        # Qwen3-30B-A3B, whose 4 heads of keys and values 8 ranks have copies of.
        (
            {
                "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "hidden_size": 2048,
                "head_dim": 128,
            },
            8,
            24576,
        ),
        # DeepSeek-V3, whose latent vectors are on every rank.
        ({"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 8, 70272),
        ({"text_config": {"num_hidden_layers": 2}}, 1, None),
    ],
)  # fmt: skip
def test_cache_bytes_per_token(config, ranks, expected):
    assert cache_bytes_per_token(config, ranks) == expected


def test_parse_gpus():
    assert parse_gpus("2x24GiB") == Gpus(2, 24 * 2**30)
    assert parse_gpus(" 4 X 80 gb ") == Gpus(4, 80 * 10**9)
    for text in ("", "2x", "x24GiB", "0x24GiB", "-1x24GiB", "2x24GiBx2", "two"):
        with pytest.raises(ValueError, match=r"`gpus`: expected a number of GPUs and the memory of each"):
            parse_gpus(text)
