import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphaq_vllm.format import (
    AlphaQSpec,
    LinearFormat,
    linear_tensors,
    matrix_tensors,
    shard_ids,
    stored_bits_per_weight,
)

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


def linear(**changes):
    return {"num_bits": 4, "group_size": 128, "modules": ["model.layers.0.self_attn.q_proj"], **changes}


@given(
    st.dictionaries(
        st.text(min_size=1), st.builds(LinearFormat, st.sampled_from([4, 8]), st.sampled_from([32, 64, 128]))
    )
)
def test_to_dict_round_trips_linear_layers(formats):
    spec = AlphaQSpec(128, AlphaQSpec.from_dict(SPEC).num_bits, formats)
    stored = json.loads(json.dumps(spec.to_dict()))
    assert AlphaQSpec.from_dict(stored) == spec
    assert ("linear" in stored) == bool(formats)


def test_from_dict_reads_linear_layers():
    groups = [linear(), linear(num_bits=8, group_size=64, modules=["a", "b"])]
    assert AlphaQSpec.from_dict(changed(linear=groups)).linear == {
        "model.layers.0.self_attn.q_proj": LinearFormat(4, 128),
        "a": LinearFormat(8, 64),
        "b": LinearFormat(8, 64),
    }


def test_from_dict_reads_experts_without_a_gate():
    module = "backbone.layers.1.mixer.experts"
    spec = AlphaQSpec.from_dict(changed(num_bits={module: {"up_proj": "34", "down_proj": "21"}}))
    assert spec.num_bits == {module: {"up_proj": (3, 4), "down_proj": (2, 1)}}
    assert AlphaQSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_shard_ids_are_vllms_for_experts_with_a_gate_and_without():
    assert shard_ids(("gate_proj", "up_proj", "down_proj")) == {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    assert shard_ids(("w2", "w1", "w3")) == {"w1": "w1", "w2": "w2", "w3": "w3"}
    assert shard_ids(("down_proj", "up_proj")) == {"up_proj": "w1", "down_proj": "w2"}


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
        (
            changed(num_bits={MODULE: {"gate_proj": "2", "up_proj": "2"}}),
            "expected gate_proj, .* got gate_proj, up_proj",
        ),
        (
            changed(num_bits={MODULE: {"w1": "2", "gate_proj": "2", "w2": "2"}}),
            "expected gate_proj, .* got w1, gate_proj",
        ),
        (changed(num_bits={MODULE: {"w1": "2", "w2": "2"}}), "expected gate_proj, .* got w1, w2"),
        (changed(num_bits={MODULE: {}}), "expected gate_proj, .* got none"),
        (changed(num_bits={MODULE: "234"}), "expected an object with the widths of each projection"),
        (changed(num_bits={MODULE: {"w1": "2", "w3": "9", "w2": "2"}}), "w3: expected one digit from 1 to 8"),
        (changed(num_bits={MODULE: {"w1": "2", "w3": "0", "w2": "2"}}), "w3: expected one digit from 1 to 8"),
        (changed(num_bits={MODULE: {"w1": "2", "w3": [2], "w2": "2"}}), "w3: expected one digit from 1 to 8"),
        (changed(num_bits={MODULE: {"w1": "2", "w3": "22", "w2": "2"}}), "same number of experts"),
        (changed(linear={}), "linear: expected a list of objects"),
        (changed(linear=[]), "linear: expected a list of objects"),
        (changed(linear=None), "linear: expected a list of objects"),
        (changed(linear=["q_proj"]), r"linear\[0\]: expected an object"),
        (changed(linear=[linear(symmetric=True)]), r"linear\[0\]: .* unknown \['symmetric'\]"),
        (changed(linear=[{"num_bits": 4, "group_size": 32}]), r"linear\[0\]: .* missing \['modules'\]"),
        (changed(linear=[linear(num_bits=3)]), r"linear\[0\].num_bits: expected one of \(4, 8\), got 3"),
        (changed(linear=[linear(num_bits=True)]), r"linear\[0\].num_bits: expected one of"),
        (changed(linear=[linear(), linear(group_size=16)]), r"linear\[1\].group_size: expected one of"),
        (changed(linear=[linear(modules="q_proj")]), r"linear\[0\].modules: expected a list of names"),
        (changed(linear=[linear(modules=[])]), r"linear\[0\].modules: expected a list of names"),
        (changed(linear=[linear(modules=["", "a"])]), r"linear\[0\].modules: expected a list of names"),
        (changed(linear=[linear(), linear()]), "each linear layer once, got 'model.layers.0.self_attn.q_proj' again"),
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
    # And a scale for each row.
    assert stored == 96 * 384 * stored_bits_per_weight(num_bits, group_size) + 96 * 16
    assert tensors["weight_packed"].dtype == torch.int32


def test_matrix_tensors_refuses_a_broken_group():
    with pytest.raises(ValueError, match="in_features=1408 is not divisible by group_size=100"):
        matrix_tensors(16, 1408, 4, 100)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_linear_tensors_have_a_scale_and_no_zero_point(num_bits):
    tensors = linear_tensors(96, 384, num_bits, 64)
    assert {name: (spec.shape, spec.dtype) for name, spec in tensors.items()} == {
        "weight_packed": ((96, 384 * num_bits // 32), torch.int32),
        "weight_scale": ((96, 6), torch.bfloat16),
    }
