"""gpt-oss: experts with biases, in a model that loads them one by one as vLLM's own does not."""

import pytest
import torch
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.model_loader import get_model

from alphaq_vllm import convert
from alphaq_vllm.kernels import GPT_OSS, MoEWeights, PackedExperts, Routing
from alphaq_vllm.plugin.gpt_oss import GptOssMoEMethod
from tests.kernels.reference import fused_moe_reference
from tests.plugin.layers import HIDDEN, INTERMEDIATE, MODULE, TOP_K, build, run, stored_tensors, widths
from tests.reliability.loading import engine_config, one_rank, reload, same, state
from tests.serving.test_families import save_model

NUM_EXPERTS = 10
OPTIONS = {"activation": MoEActivation.SWIGLUOAI, "has_bias": True}
# On a CPU all computes in float32.
BOUND = 1e-4


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator().manual_seed(2)
    biases = {"gate_up_proj_bias": 2 * INTERMEDIATE, "down_proj_bias": HIDDEN}
    return stored_tensors(NUM_EXPERTS) | {
        name: torch.randn(NUM_EXPERTS, size, generator=generator).bfloat16() for name, size in biases.items()
    }


@pytest.fixture(scope="module")
def routed():
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(33, NUM_EXPERTS, generator=generator).argsort(1)[:, :TOP_K].int()
    ids[5:8] = -1
    return 4 * torch.randn(33, HIDDEN, generator=generator), torch.rand(33, TOP_K, generator=generator), ids


def loaded(tensors, *arguments):
    layer = build(NUM_EXPERTS, *arguments, **OPTIONS)
    for name, tensor in tensors.items():
        layer.quant_method.load(layer, name, tensor)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def expected(tensors, routed):
    """The layer in float64, gate and up taken apart as gpt-oss stores their biases."""

    def experts(*projections):
        suffixes = ("weight_packed", "weight_scale", "weight_grid")
        bits = widths(NUM_EXPERTS)
        return PackedExperts.from_matrices(
            [
                [(*(tensors[f"{e}.{name}.{suffix}"] for suffix in suffixes), bits[name][e]) for name in projections]
                for e in range(NUM_EXPERTS)
            ]
        )

    gate_up = tensors["gate_up_proj_bias"]
    biases = torch.stack((gate_up[:, 0::2], gate_up[:, 1::2]), 1), tensors["down_proj_bias"]
    weights = MoEWeights(experts("gate_proj", "up_proj"), experts("down_proj"), *biases, GPT_OSS)
    return fused_moe_reference(routed[0], weights, Routing(*routed[1:]))


def test_layer_computes_what_the_checkpoint_means(tensors, routed):
    exact = expected(tensors, routed)
    difference = (run(loaded(tensors), *routed) - exact).abs().max()
    assert difference < BOUND * exact.abs().max()
    # The clamp acts, or the test would not show it.
    assert (exact - expected(tensors, (routed[0] / 4, *routed[1:]))).abs().max() > 1


def tensor_parallel(size):
    return [({"tp_size": size, "tp_rank": rank},) for rank in range(size)]


def expert_parallel(size, placement):
    return [({"use_ep": True, "ep_size": size, "ep_rank": rank}, placement) for rank in range(size)]


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(tensor_parallel(2), id="tensor-parallel-2"),
        pytest.param(tensor_parallel(3), id="tensor-parallel-3"),
        pytest.param(expert_parallel(3, "linear"), id="expert-parallel-linear"),
        pytest.param(expert_parallel(3, "round_robin"), id="expert-parallel-round-robin"),
    ],
)
def test_ranks_compute_the_layer_together(ranks, tensors, routed):
    total = sum(run(loaded(tensors, *rank), *routed) for rank in ranks)
    exact = expected(tensors, routed)
    assert (total - exact).abs().max() < BOUND * exact.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda tensors: tensors.pop("down_proj_bias"),
            "down_proj_bias: expected in the checkpoint, got nothing",
            id="missing",
        ),
        pytest.param(
            lambda tensors: tensors.update(gate_up_proj_bias=tensors["gate_up_proj_bias"][:, 2:]),
            r"gate_up_proj_bias: expected floating point of shape \(10, 384\), got torch.bfloat16 of shape \(10, 382\)",
            id="shape",
        ),
        pytest.param(
            lambda tensors: tensors.update(down_proj_bias=tensors["down_proj_bias"] * float("nan")),
            "down_proj_bias: expected finite values",
            id="nan",
        ),
        pytest.param(
            lambda tensors: tensors.update({"3.gate_proj.weight": torch.zeros(1)}),
            r"3\.gate_proj\.weight: expected a tensor of quantized experts or their biases",
            id="unknown",
        ),
    ],
)
def test_layer_refuses_a_damaged_checkpoint(change, message, tensors):
    tensors = dict(tensors)
    change(tensors)
    with pytest.raises(ValueError, match=rf"{MODULE}\.{message}"):
        loaded(tensors)


def test_model_loads_and_reloads_in_place_beside_a_layer_that_is_not_quantized(tmp_path):
    source, checkpoint = tmp_path / "source", tmp_path / "checkpoint"
    save_model("gpt_oss", source)
    convert(source, checkpoint, bits=3, noise="measured", group_size=64, exclude=("*.layers.0.*",), quantizer="mse")
    (shard,) = checkpoint.glob("*.safetensors")
    tensors = load_file(shard)
    config = engine_config(checkpoint, verify=True, skip_tokenizer_init=True)
    with one_rank(tmp_path), set_current_vllm_config(config):
        model = get_model(vllm_config=config)
        plain, quantized = (m for m in model.modules() if isinstance(m, RoutedExperts))
        assert type(quantized.quant_method) is GptOssMoEMethod
        # vLLM brings the weights into an order of its own.
        stored = tensors["model.layers.0.mlp.experts.down_proj"]
        assert torch.equal(plain.w2_weight.flatten().sort().values.cpu(), stored.flatten().sort().values)
        before = state(model)
        for parameter in quantized.parameters():
            parameter.data.zero_()
        reload(model, config, tensors)
        assert same(state(model), before)
