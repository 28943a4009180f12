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


def test_get_quant_method_refuses_experts_under_another_name():
    config = AlphaQConfig(SPEC)
    with pytest.raises(ValueError, match=r"vLLM calls these experts model\.layers\.1\.mlp\.experts"):
        config.get_quant_method(routed_experts(), "model.layers.1.mlp.experts")
