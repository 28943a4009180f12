"""Exclusions and overrides by pattern."""

import pytest

from offline.source.families import ExpertMatrix, Experts
from offline.source.selection import Selection, of_modules

MODULES = [f"model.layers.{layer}.mlp.experts" for layer in range(3)]
MATRICES = tuple(
    ExpertMatrix(module, expert, name, (64, 64))
    for module in MODULES
    for expert in range(2)
    for name in ("gate_proj", "up_proj", "down_proj")
)
EXPERTS = Experts("qwen2_moe", 2, MATRICES)


def test_exclude_removes_whole_modules():
    kept = Selection(exclude=("*.layers.0.*", "model.layers.2.mlp.experts.*")).quantized(EXPERTS)
    assert kept.modules == [MODULES[1]]
    assert len(kept.matrices) == 6
    assert Selection().quantized(EXPERTS) == EXPERTS


def test_exclude_may_be_put_together_from_parts_of_a_module():
    kept = Selection(exclude=("*.layers.1.*_proj", "*.layers.0.*.0.*", "*.layers.0.*.1.*")).quantized(EXPERTS)
    assert kept.modules == [MODULES[2]]


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (("*.layers.7.*",), r"`exclude`: .* such as 'model\.layers\.0\.mlp\.experts\.\*', got '\*\.layers\.7\.\*'"),
        (("*.layers.0.*.1.*",), r"cannot be served, .* leave .*layers\.0.*: exclude 'model\.layers\.0\.mlp\.experts"),
        (("*down_proj",), "expected whole modules"),
        (("*",), "expected to leave some experts, got all 18"),
    ],
)
def test_exclude_refuses(exclude, message):
    with pytest.raises(ValueError, match=message):
        Selection(exclude=exclude).quantized(EXPERTS)


def test_overrides_give_widths_to_what_they_match():
    fixed = Selection(overrides=(("*.layers.0.*down_proj", 8), ("*.layers.[12].*.0.gate_proj", 4))).fixed(MATRICES)
    assert fixed == {
        f"{MODULES[0]}.0.down_proj": 8,
        f"{MODULES[0]}.1.down_proj": 8,
        f"{MODULES[1]}.0.gate_proj": 4,
        f"{MODULES[2]}.0.gate_proj": 4,
    }


def test_overrides_may_agree_but_not_conflict():
    agreeing = Selection(overrides=(("*.0.gate_proj", 4), ("*.layers.0.*.0.gate_proj", 4)))
    assert set(agreeing.fixed(MATRICES).values()) == {4}
    with pytest.raises(ValueError, match=r"one width for model\.layers\.0\.mlp\.experts\.0\.gate_proj, got 4 and 3"):
        Selection(overrides=(("*.0.gate_proj", 4), ("*.layers.0.*", 3))).fixed(MATRICES)


def test_overrides_that_match_nothing_are_refused_also_after_exclusions():
    selection = Selection(exclude=("*.layers.0.*",), overrides=(("*.layers.0.*", 4),))
    with pytest.raises(ValueError, match=r"`override`: .* which matches none"):
        selection.fixed(selection.quantized(EXPERTS).matrices)


def test_of_modules_refuses_what_the_model_lacks():
    assert of_modules(EXPERTS, [MODULES[1]]).modules == [MODULES[1]]
    with pytest.raises(ValueError, match=r"got also model\.layers\.9"):
        of_modules(EXPERTS, ["model.layers.9.mlp.experts"])
