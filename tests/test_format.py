import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphaq_vllm.format import AlphaQSpec, matrix_tensors, stored_bits_per_weight

SPEC = {
    "quant_method": "alphaq",
    "format_version": 1,
    "group_size": 128,
    "num_bits": {"model.layers.0.mlp.experts": {"gate_proj": "23", "up_proj": "34", "down_proj": "18"}},
}


def changed(**changes):
    return {**SPEC, **changes}


def test_from_dict_reads_one_digit_per_expert():
    spec = AlphaQSpec.from_dict(SPEC)
    assert spec.group_size == 128
    assert spec.num_bits["model.layers.0.mlp.experts"] == {"gate_proj": (2, 3), "up_proj": (3, 4), "down_proj": (1, 8)}


@given(st.lists(st.tuples(*[st.integers(1, 8)] * 3), min_size=1, max_size=40), st.sampled_from([32, 64, 128]))
def test_to_dict_round_trips_through_json(widths, group_size):
    gate, up, down = (tuple(bits) for bits in zip(*widths, strict=True))
    spec = AlphaQSpec(group_size, {"model.layers.3.block_sparse_moe.experts": {"w1": gate, "w3": up, "w2": down}})
    assert AlphaQSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


MODULE = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "expected an object, got list"),
        (changed(quant_method="awq"), "expected 'alphaq', got 'awq'"),
        (changed(format_version=2), "reads up to 1, got 2: upgrade alphaq-vllm"),
        (changed(format_version="1"), "format_version: expected 1, got '1'"),
        (changed(format_version=True), "format_version: expected 1, got True"),
        (changed(format_version=0), "format_version: expected 1, got 0"),
        (changed(group_size=100), "group_size: expected one of"),
        (changed(group_size=128.0), "group_size: expected one of"),
        (changed(extra=1), r"unknown \['extra'\]"),
        ({k: v for k, v in SPEC.items() if k != "num_bits"}, r"missing \['num_bits'\]"),
        (changed(num_bits={}), "expected an object with one entry per module"),
        (changed(num_bits={MODULE: {"gate_proj": "2", "up_proj": "2"}}), "expected the widths of gate_proj"),
        (changed(num_bits={MODULE: {"w1": "2", "gate_proj": "2", "w2": "2"}}), "expected the widths of gate_proj"),
        (changed(num_bits={MODULE: "234"}), "expected the widths of gate_proj"),
        (changed(num_bits={MODULE: {"w1": "2", "w3": "9", "w2": "2"}}), "w3: expected one digit from 1 to 8"),
        (changed(num_bits={MODULE: {"w1": "2", "w3": "0", "w2": "2"}}), "w3: expected one digit from 1 to 8"),
        (changed(num_bits={MODULE: {"w1": "2", "w3": [2], "w2": "2"}}), "w3: expected one digit from 1 to 8"),
        (changed(num_bits={MODULE: {"w1": "2", "w3": "22", "w2": "2"}}), "same number of experts"),
    ],
)
def test_from_dict_refuses(config, message):
    with pytest.raises(ValueError, match=message):
        AlphaQSpec.from_dict(config)


@pytest.mark.parametrize("num_bits", range(1, 9))
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_matrix_tensors_take_the_stated_bits(num_bits, group_size):
    tensors = matrix_tensors(96, 384, num_bits, group_size)
    stored = 8 * sum(spec.nbytes for spec in tensors.values())
    assert stored == 96 * 384 * stored_bits_per_weight(num_bits, group_size)
    assert tensors["weight_packed"].dtype == torch.int32


def test_matrix_tensors_refuses_a_broken_group():
    with pytest.raises(ValueError, match="in_features=1408 is not divisible by group_size=100"):
        matrix_tensors(16, 1408, 4, 100)
