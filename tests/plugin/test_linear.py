"""Linear layers as vLLM builds, loads and computes them, in this process."""

import subprocess
import sys

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from alphaq_vllm.format import AlphaQSpec, LinearFormat
from alphaq_vllm.linear_packing import dequantize
from alphaq_vllm.plugin import support
from alphaq_vllm.plugin.config import AlphaQConfig
from alphaq_vllm.plugin.cpu_linear import NativeLinear
from offline.quantizers.symmetric import quantize_symmetric

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's GPU build")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = [pytest.param("cpu", marks=on_cpu), pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])]
LINEAR = LinearFormat(4, 64)


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    with set_current_vllm_config(VllmConfig()):
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        init_distributed_environment(1, 0, f"file://{store}", 0, backend)
        ensure_model_parallel_initialized(1, 1)
        yield
    cleanup_dist_env_and_memory()


@pytest.fixture
def vllms_kernel(monkeypatch):
    """As on a machine without a compiler, where this project's kernel for CPUs cannot be built."""
    monkeypatch.setattr(NativeLinear, "takes", lambda rows: False)


def config_of(modules, linear_format=LINEAR):
    config = AlphaQConfig(AlphaQSpec(128, {}, dict.fromkeys(modules, linear_format)))
    config.packed_modules_mapping = FUSED
    return config


def build(kind, config, dtype=torch.bfloat16):
    options = {"quant_config": config, "params_dtype": dtype}
    if kind == "qkv":
        return QKVParallelLinear(256, 32, 8, 2, bias=True, prefix=f"{ATTENTION}.qkv_proj", **options)
    if kind == "gate_up":
        return MergedColumnParallelLinear(256, [192] * 2, bias=False, prefix=f"{MLP}.gate_up_proj", **options)
    if kind == "down":
        return RowParallelLinear(192, 256, bias=False, prefix=f"{MLP}.down_proj", **options)
    return ReplicatedLinear(256, 96, bias=False, prefix=f"{ATTENTION}.kv_a_proj_with_mqa", **options)


# The checkpoint's layers in each of vLLM's: name, shard id, shape.
PARTS = {
    "qkv": [("q_proj", "q", (256, 256)), ("k_proj", "k", (64, 256)), ("v_proj", "v", (64, 256))],
    "gate_up": [("gate_proj", 0, (192, 256)), ("up_proj", 1, (192, 256))],
    "down": [("down_proj", None, (256, 192))],
    "replicated": [("kv_a_proj_with_mqa", None, (96, 256))],
}


def names(kind):
    parent = ATTENTION if kind in ("qkv", "replicated") else MLP
    return [f"{parent}.{name}" for name, *_ in PARTS[kind]]


def load(layer, suffix, tensor, shard):
    param = getattr(layer, suffix)
    param.weight_loader(param, tensor, *(() if shard is None else (shard,)))


def loaded(kind, linear_format, dtype=torch.bfloat16):
    """A layer with random weights, ready to be used, and those weights."""
    layer = build(kind, config_of(names(kind), linear_format), dtype)
    weights = []
    for _, shard, shape in PARTS[kind]:
        quantized = quantize_symmetric(torch.randn(shape) / 16, linear_format.num_bits, linear_format.group_size)
        load(layer, "weight_packed", quantized.packed, shard)
        load(layer, "weight_scale", quantized.scale, shard)
        weights.append(dequantize(quantized.packed, quantized.scale, linear_format.num_bits))
    layer.quant_method.process_weights_after_loading(layer)
    return layer, torch.cat(weights)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", PARTS)
def test_layer_computes_with_the_dequantized_weights(device, num_bits, group_size, dtype, kind):
    torch.manual_seed(0)
    with torch.device(device):
        layer, weight = loaded(kind, LinearFormat(num_bits, group_size), dtype)
        if layer.bias is not None:
            layer.bias.data.normal_()
        for tokens in (1, 7, 40):
            x = torch.randn(tokens, weight.shape[1], dtype=dtype)
            bias = None if layer.bias is None else layer.bias.float()
            expected = torch.nn.functional.linear(x.float(), weight, bias)
            result = layer.quant_method.apply(layer, x, layer.bias)
            torch.testing.assert_close(result.float(), expected, rtol=0.02, atol=0.02)


@on_cpu
def test_layer_runs_this_projects_kernel_on_a_cpu():
    layer, weight = loaded("down", LINEAR, torch.float32)
    assert isinstance(layer.quant_method.scheme, NativeLinear)
    x = torch.randn(5, weight.shape[1])
    torch.testing.assert_close(layer.quant_method.apply(layer, x), x @ weight.T, rtol=1e-5, atol=1e-5)


@on_cpu
@pytest.mark.skipif(not support.has_cpu_int4_kernel(), reason="vLLM has no kernel for this processor")
def test_layer_runs_vllms_kernel_on_a_cpu_without_a_compiler(vllms_kernel, monkeypatch):
    # Else vLLM rounds activations to 8 bits on CPUs with AMX.
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")
    layer, weight = loaded("down", LINEAR)
    assert type(layer.quant_method.scheme.kernel).__module__.startswith("vllm.model_executor.kernels.linear")
    x = torch.randn(5, weight.shape[1], dtype=torch.bfloat16)
    result = layer.quant_method.apply(layer, x)
    torch.testing.assert_close(result.float(), x.float() @ weight.T, rtol=0.02, atol=0.02)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("num_bits", [4, 8])
def test_layer_runs_marlin_or_machete_on_a_gpu(num_bits):
    with torch.device("cuda"):
        layer, _ = loaded("down", LinearFormat(num_bits, 64))
    assert type(layer.quant_method.scheme.kernel).__name__ in ("MarlinLinearKernel", "MacheteLinearKernel")


def test_layer_without_an_entry_stays_unquantized():
    layer = build("down", config_of([f"{MLP}.gate_proj"]))
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)


def test_layer_fused_on_disk_loads_as_one_tensor():
    layer = build("gate_up", config_of([f"{MLP}.gate_up_proj"]))
    quantized = quantize_symmetric(torch.randn(384, 256), 4, 64)
    load(layer, "weight_packed", quantized.packed, None)
    load(layer, "weight_scale", quantized.scale, None)
    assert torch.equal(layer.weight_packed.data, quantized.packed)
    layer.quant_method.process_weights_after_loading(layer)


def test_fused_layer_whose_parts_disagree_is_refused():
    with pytest.raises(ValueError, match="must be stored alike"):
        build("qkv", config_of(names("qkv")[:2]))


@on_cpu
def test_width_without_a_kernel_is_refused(vllms_kernel):
    with pytest.raises(ValueError, match=r"mlp\.down_proj: vLLM has no kernel for a linear layer of 8 bits"):
        build("down", config_of(names("down"), LinearFormat(8, 64)))


@on_cpu
def test_processor_without_a_kernel_is_refused(vllms_kernel, monkeypatch):
    monkeypatch.setattr(support, "has_cpu_int4_kernel", lambda: False)
    with pytest.raises(ValueError, match=r"mlp\.down_proj: vLLM has no kernel for 4-bit .* AVX-512: install a C"):
        build("down", config_of(names("down")))


@on_cpu
def test_kernel_is_missing_from_what_vllm_loads_without_avx512():
    code = """
import torch
torch.cpu._is_avx512_supported = lambda: False
import vllm._custom_ops
from alphaq_vllm.plugin.support import has_cpu_int4_kernel
assert not has_cpu_int4_kernel()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_float32_is_refused(vllms_kernel):
    with pytest.raises(ValueError, match=r"mlp\.down_proj: expected bfloat16 or float16 .* got torch\.float32"):
        build("down", config_of(names("down")), torch.float32)


def as_rank(monkeypatch, rank, size):
    """Layers that vLLM builds from here on are those of one of several ranks."""
    for module in (linear, parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)


@on_cpu
def test_ranks_whose_shares_cut_groups_compute_the_layer_together(monkeypatch):
    """192 columns in groups of 64 are shared by 2 ranks as 3 groups of 32 each."""
    quantized = quantize_symmetric(torch.randn(256, 192) / 16, 4, 64)
    x, total = torch.randn(7, 192), torch.zeros(7, 256)
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        layer = build("down", config_of(names("down")), torch.float32)
        load(layer, "weight_packed", quantized.packed, None)
        load(layer, "weight_scale", quantized.scale, None)
        assert layer.weight_scale.shape == (256, 3)
        layer.quant_method.process_weights_after_loading(layer)
        total += layer.quant_method.apply(layer, x[:, 96 * rank : 96 * rank + 96].contiguous())
    expected = x @ dequantize(quantized.packed, quantized.scale, 4).T
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_share_without_whole_groups_of_any_size_is_refused(monkeypatch):
    as_rank(monkeypatch, 0, 4)
    with pytest.raises(ValueError, match=r"mlp\.down_proj: in_features=192 is 48 per rank, .* not divisible by 32"):
        build("down", config_of(names("down")))


def test_columns_that_are_no_groups_are_refused():
    with pytest.raises(ValueError, match=r"in_features=192 is not divisible by group_size=128: config.json does not"):
        build("down", config_of(names("down"), LinearFormat(4, 128)))


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("weight_packed", torch.zeros(64, 31, dtype=torch.int32), "expected torch.int32 with 32 columns"),
        ("weight_packed", torch.zeros(64, 32), "expected torch.int32 with 32 columns .* got torch.float32"),
        ("weight_scale", torch.zeros(64, 5, dtype=torch.bfloat16), "expected torch.bfloat16 with 4 columns"),
    ],
)
def test_tensor_that_disagrees_with_the_config_is_refused(suffix, tensor, message):
    layer = build("qkv", config_of(names("qkv")))
    with pytest.raises(ValueError, match=rf"self_attn\.k_proj\.{suffix}: {message}"):
        load(layer, suffix, tensor, "k")


def test_missing_tensor_is_refused():
    layer = build("qkv", config_of(names("qkv")))
    for _, shard, shape in PARTS["qkv"]:
        quantized = quantize_symmetric(torch.randn(shape), 4, 64)
        load(layer, "weight_packed", quantized.packed, shard)
        if shard != "v":
            load(layer, "weight_scale", quantized.scale, shard)
    with pytest.raises(ValueError, match=r"self_attn\.v_proj\.weight_scale: expected in the checkpoint, got nothing"):
        layer.quant_method.process_weights_after_loading(layer)


def test_infinite_scale_is_refused():
    layer = build("gate_up", config_of(names("gate_up")))
    for _, shard, shape in PARTS["gate_up"]:
        quantized = quantize_symmetric(torch.randn(shape), 4, 64)
        quantized.scale[-1, -1] = torch.inf if shard == 1 else 1
        load(layer, "weight_packed", quantized.packed, shard)
        load(layer, "weight_scale", quantized.scale, shard)
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight_scale: expected finite values"):
        layer.quant_method.process_weights_after_loading(layer)
