"""What vLLM may be asked for that AlphaQ does not serve: refused when the layer is built, before weights load."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from alphaq_vllm.plugin import support
from tests.plugin.layers import MODULE, build

DATA_PARALLEL = {"dp_size": 2, "use_ep": True, "ep_size": 2}


@pytest.mark.parametrize(
    ("parallel", "options", "message"),
    [
        pytest.param({"enable_eplb": True, "use_ep": True, "ep_size": 2}, {}, "--enable-eplb moves experts", id="eplb"),
        pytest.param(
            {**DATA_PARALLEL, "all2all_backend": "deepep_low_latency"},
            {},
            r"--all2all-backend deepep_low_latency does not hand out .* use one of allgather_reducescatter, ",
            id="all2all-data-parallel",
        ),
        pytest.param(
            {
                "sp_size": 2,
                "tp_size": 1,
                "use_ep": True,
                "ep_size": 2,
                "all2all_backend": "flashinfer_nvlink_one_sided",
            },
            {},
            "--all2all-backend flashinfer_nvlink_one_sided does not hand out",
            id="all2all-sequence-parallel",
        ),
        pytest.param(
            {**DATA_PARALLEL, "all2all_backend": "deepep_v2"},
            {"in_dtype": torch.float16},
            "--all2all-backend deepep_v2 expects --dtype bfloat16, got torch.float16",
            id="deepep-dtype",
        ),
        pytest.param(
            {**DATA_PARALLEL, "all2all_backend": "deepep_high_throughput"},
            {},
            "hidden size divisible by 256, got 128: use --all2all-backend allgather_reducescatter",
            id="deepep-hidden-size",
        ),
        pytest.param({"all2all_backend": "passthrough"}, {}, "--all2all-backend passthrough", id="passthrough"),
        pytest.param(
            {"pcp_size": 2, "use_ep": True, "ep_size": 2}, {}, "--prefill-context-parallel-size 2", id="prefill-context"
        ),
        pytest.param(
            {"tp_size": 4},
            {},
            r"intermediate_size=192 over --tensor-parallel-size 4 is 48 per rank, .* by 32: .* out of \[1, 2, 3, 6\]",
            id="tensor-parallel",
        ),
        pytest.param(
            {}, {"group_size": 128}, r"intermediate_size=192 is not divisible by group_size=128", id="other-group-size"
        ),
        pytest.param(
            {}, {"hidden_dim": 80}, r"hidden_size=80 is not divisible by group_size=32", id="other-hidden-size"
        ),
        pytest.param({}, {"has_bias": True}, "expected experts without bias", id="bias"),
        pytest.param({}, {"activation": MoEActivation.SITU}, "an activation out of", id="activation"),
        pytest.param(
            {}, {"activation": MoEActivation.SWIGLUSTEP, "swiglu_limit": 5.0}, "got swiglustep .*=5.0", id="limit"
        ),
        pytest.param(
            {},
            {"activation": MoEActivation.SWIGLUOAI_UNINTERLEAVE},
            "got swigluoai_uninterleave .*=None",
            id="no-limit",
        ),
        pytest.param(
            {}, {"activation": MoEActivation.SWIGLUOAI}, "got swigluoai with has_bias=False", id="gpt-oss-without-bias"
        ),
    ],
)
def test_build_refuses(parallel, options, message):
    with pytest.raises(ValueError, match=rf"^{MODULE}: .*{message}"):
        build(4, parallel, **options)


@pytest.mark.parametrize(
    "parallel",
    [
        DATA_PARALLEL,
        {**DATA_PARALLEL, "sp_size": 2, "ep_size": 4},
        {"all2all_backend": "deepep_low_latency"},
        {"dp_size": 2, "all2all_backend": "deepep_low_latency"},
    ],
)
def test_build_accepts_what_vllm_exchanges_itself(parallel):
    build(4, parallel)


def test_check_experts_refuses_float32_where_there_is_a_gpu(monkeypatch):
    config = build(4).moe_config
    monkeypatch.setattr(type(support.current_platform), "is_cpu", lambda self: False)
    config.in_dtype = torch.float32
    with pytest.raises(ValueError, match="expected --dtype bfloat16 or float16, got float32"):
        support.check_experts(config, MODULE, 32, 4)
    config.in_dtype = torch.bfloat16
    support.check_experts(config, MODULE, 32, 4)


def check_with_lora(targets):
    config = build(4).moe_config
    config.is_lora_enabled = True
    vllm_config = VllmConfig()
    # Given to the constructor, vLLM 0.33 asks for a model too.
    vllm_config.lora_config = LoRAConfig(target_modules=targets, lora_dtype=torch.bfloat16)
    with set_current_vllm_config(vllm_config):
        support.check_experts(config, MODULE, 32, 4)


@pytest.mark.parametrize("targets", [None, ["q_proj", "experts"], ["model.layers.0.mlp.experts"]])
def test_check_experts_refuses_lora_on_experts(targets):
    with pytest.raises(ValueError, match=r"LoRA on routed experts is not supported .* --lora-target-modules q_proj"):
        check_with_lora(targets)


def test_check_experts_accepts_lora_on_other_layers():
    check_with_lora(["q_proj", "shared_experts"])
