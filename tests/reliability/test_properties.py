"""What must hold for any input of a kind, not for examples alone."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaq_vllm.format import GRID, PACKED, SCALE, AlphaQSpec, TensorSpec, matrix_tensors
from alphaq_vllm.packing import dequantize, unpack
from offline.allocation.bit_map import average_bits
from offline.allocation.widths import Budget, choose
from offline.quantizers.quantize import quantize
from offline.sensitivity.matrices import MatrixStats
from offline.source.header import DTYPES, layout, read_header
from tests.reliability.targets import SPEC

WIDTHS = st.sets(st.integers(1, 8), min_size=1).map(lambda widths: tuple(sorted(widths)))
POSITIVE = st.floats(1e-6, 1e6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_any_json_is_a_spec_or_a_value_error(content):
    with pytest.raises(ValueError, match="quantization_config"):
        AlphaQSpec.from_dict(content)


def paths(content, path=()):
    """The places of all values in nested objects and lists."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from paths(value, (*path, key))


LINEAR = [{"num_bits": 8, "group_size": 64, "modules": ["a", "b"]}]


@given(st.data(), JSON)
@settings(max_examples=300)
def test_a_spec_with_one_value_replaced_is_itself_or_refused(data, value):
    content = json.loads(json.dumps({**SPEC, "linear": LINEAR}))
    *parents, last = data.draw(st.sampled_from([path for path in paths(content) if path]))
    place = content
    for key in parents:
        place = place[key]
    place[last] = value
    try:
        spec = AlphaQSpec.from_dict(content)
    except ValueError:
        return
    assert spec.to_dict() == content


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=9).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 5), max_size=3).map(tuple), st.sampled_from(list(DTYPES.values()))),
        max_size=6,
    )
)
@settings(deadline=None)
def test_read_header_finds_what_layout_placed(tmp_path_factory, tensors):
    specs = {name: TensorSpec(*spec) for name, spec in tensors.items()}
    header, offsets = layout(specs)
    path = tmp_path_factory.getbasetemp() / "laid-out.safetensors"
    path.write_bytes(header + bytes(sum(spec.nbytes for spec in specs.values())))
    found = read_header(path)
    assert {name: stored.spec for name, stored in found.items()} == specs
    # Tensors without bytes may share a place.
    assert all(found[name].offset == offsets[name] for name, spec in specs.items() if spec.nbytes)


@given(
    num_bits=st.integers(1, 8),
    group_size=st.sampled_from([32, 64, 128]),
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    scale=st.integers(-30, 30),
    quantizer=st.sampled_from(["mse", "rtn", "hqq"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_what_quantize_stores_is_of_the_format_and_near_the_weights(
    num_bits, group_size, rows, groups, scale, quantizer, seed
):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * group_size, generator=generator) * 2.0**scale
    tensors = quantize(weight, num_bits, group_size, quantizer).tensors("m")
    expected = matrix_tensors(rows, groups * group_size, num_bits, group_size)
    assert {n.removeprefix("m."): TensorSpec(tuple(t.shape), t.dtype) for n, t in tensors.items()} == expected
    packed, scales, zeros = (tensors[f"m.{suffix}"] for suffix in (PACKED, SCALE, GRID))
    assert scales.isfinite().all() and zeros.isfinite().all()
    assert int(unpack(packed, num_bits).max()) < 2**num_bits
    found = dequantize(packed, scales, zeros, num_bits).view(rows, groups, -1)
    wanted = weight.view(rows, groups, -1)
    step = (wanted.amax(-1) - wanted.amin(-1)) / (2**num_bits - 1)
    error = (found - wanted).square().mean(-1)
    # Rounding to nearest is within half a step; scale and zero point are rounded too.
    assert (error <= (0.6 * step).square() + (2.0**-7 * wanted.square().mean(-1).sqrt()).square()).all()


@given(st.data(), WIDTHS, st.floats(0, 20), st.sampled_from(["projection", "expert"]))
@settings(max_examples=100, deadline=None)
def test_choose_keeps_to_any_budget(data, widths, gamma, granularity):
    names = [f"layer.{e}.{p}" for e in range(data.draw(st.integers(1, 5))) for p in ("gate", "up", "down")]
    sizes = data.draw(st.lists(st.integers(1, 10**6), min_size=3, max_size=3))
    stats = []
    for i, name in enumerate(names):
        noise = sorted(data.draw(st.lists(POSITIVE, min_size=len(widths), max_size=len(widths))), reverse=True)
        alpha, variance, reach = (data.draw(POSITIVE) for _ in range(3))
        stats.append(MatrixStats(name, alpha, variance, reach, sizes[i % 3], dict(zip(widths, noise, strict=True))))
    average = data.draw(st.floats(widths[0], widths[-1]))
    choice = choose(stats, Budget(average, widths, gamma, granularity=granularity))
    assert choice.bits.keys() == set(names)
    assert set(choice.bits.values()) <= set(widths)
    assert average_bits(choice.bits, stats) <= average * (1 + 1e-12)
    assert choice.gap >= -1e-9
    assert np.isfinite(choice.cost)
    if granularity == "expert":
        assert len({(name.rsplit(".", 1)[0], width) for name, width in choice.bits.items()}) == len(names) // 3
