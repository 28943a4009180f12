import pytest
from vllm.model_executor.layers.fused_moe import RoutedExperts

from alphaq_vllm.format import AlphaQSpec
from alphaq_vllm.plugin.config import AlphaQConfig

SPEC = AlphaQSpec(128, {"model.layers.1.block_sparse_moe.experts": {"w1": (2,), "w3": (3,), "w2": (4,)}})


def routed_experts():
    return RoutedExperts.__new__(RoutedExperts)


def test_get_quant_method_leaves_layers_without_bits_alone():
    config = AlphaQConfig(SPEC)
    assert config.get_quant_method(routed_experts(), "model.layers.11.mlp.experts") is None


def test_experts_are_found_under_the_checkpoints_name_for_their_block():
    config = AlphaQConfig(SPEC)
    assert config._experts_module("model.layers.1.mlp.experts") == "model.layers.1.block_sparse_moe.experts"


@pytest.mark.parametrize(
    "others", [["model.layers.1.mlp.experts.x"], ["model.layers.1.a.experts", "model.layers.1.b.experts"]]
)
def test_get_quant_method_refuses_experts_under_another_name(others):
    spec = AlphaQSpec(128, {f"model.layers.1.{name}": {"w1": (2,), "w3": (3,), "w2": (4,)} for name in others})
    with pytest.raises(ValueError, match=r"vLLM calls these experts model\.layers\.1\.mlp\.experts"):
        AlphaQConfig(spec).get_quant_method(routed_experts(), "model.layers.1.mlp.experts")
