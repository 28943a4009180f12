"""Models quantized while they are loaded: what a rank's layer then holds, and how widths are chosen and kept."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.config import LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.utils.torch_utils import set_default_torch_dtype

from alphaq_vllm import convert
from alphaq_vllm.format import AlphaQSpec
from alphaq_vllm.plugin import online
from alphaq_vllm.plugin.config import AlphaQConfig
from alphaq_vllm.plugin.online import choose_online
from offline.operations import cache as cache_module
from offline.quantizers.quantize import quantize, scales_of
from tests.offline.conftest import COMMON, CONFIGS

MODEL = Path(__file__).parents[1] / "models" / "docs-moe"
MODULE = "model.layers.1.mlp.experts"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
CHOOSE = """
import logging, sys
from alphaq_vllm.plugin.online import choose_online
logging.basicConfig(level="INFO", force=True)
choose_online(sys.argv[1], None, {})
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test alone."""
    monkeypatch.setenv("ALPHAQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path):
    """A copy of the embedded model, to be changed."""
    return shutil.copytree(MODEL, tmp_path / "model")


def chosen(model=MODEL, **settings):
    config = AlphaQConfig.from_config({"quant_method": "alphaq", **settings})
    config.maybe_update_config(str(model))
    return config


def edit_config(model, **entries):
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps({**config, **entries}))


def build(config, tp=(1, 0), ep=(1, 0)):
    """The experts of layer 1 of the embedded model, as one rank has them; tp, ep: number of ranks, and its own."""
    model = json.loads((MODEL / "config.json").read_bytes())
    parallel = FusedMoEParallelConfig(
        tp_size=tp[0], tp_rank=tp[1], ep_size=ep[0], ep_rank=ep[1], pcp_size=1, pcp_rank=0, dp_size=1, dp_rank=0,
        sp_size=1, use_ep=ep[0] > 1, all2all_backend="allgather_reducescatter", enable_eplb=False,
    )  # fmt: skip
    with set_current_vllm_config(VllmConfig()):
        moe = FusedMoEConfig(
            num_experts=model["num_experts"],
            experts_per_token=model["num_experts_per_tok"],
            hidden_dim=model["hidden_size"],
            intermediate_size=model["moe_intermediate_size"],
            num_local_experts=model["num_experts"] // ep[0],
            num_logical_experts=model["num_experts"],
            activation=MoEActivation.SILU,
            device="cpu",
            routing_method=RoutingMethodType.Renormalize,
            moe_parallel_config=parallel,
            in_dtype=torch.bfloat16,
        )
        experts = ExpertMapManager(
            max_num_batched_tokens=64,
            top_k=moe.experts_per_token,
            global_num_experts=moe.num_experts,
            num_redundant_experts=0,
            num_expert_group=None,
            moe_parallel_config=parallel,
            placement_strategy="linear",
            enable_eplb=False,
        )
        return RoutedExperts(MODULE, torch.bfloat16, moe, config, experts)


def load(layer, checkpoint, change=None):
    """Load the layer as vLLM's loader does, from a checkpoint's tensors, changed by ``change(tensors)``."""
    tensors = {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
    if change:
        change(tensors)
    own = [(name.removeprefix(f"{MODULE}."), tensor) for name, tensor in tensors.items() if name.startswith(MODULE)]
    with set_default_torch_dtype(torch.bfloat16):
        list(layer.load_weights(own))
    layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    "rank",
    [
        pytest.param({}, id="one"),
        pytest.param({"tp": (2, 0)}, id="tensor-parallel-0"),
        pytest.param({"tp": (2, 1)}, id="tensor-parallel-1"),
        pytest.param({"ep": (2, 1)}, id="expert-parallel-1"),
    ],
)
@pytest.mark.parametrize(
    ("quantizer", "group_size"),
    [
        pytest.param("mse", 64, id="mse"),
        pytest.param("hqq", 64, id="hqq"),
        # Two ranks share the one group of 128 columns.
        pytest.param("mse", 128, id="cut-groups"),
    ],
)
def test_a_layer_holds_the_bytes_of_the_converted_checkpoint(tmp_path, rank, quantizer, group_size):
    convert(MODEL, tmp_path / "out", bits=3.5, noise="expert", group_size=group_size, quantizer=quantizer)
    stored = AlphaQConfig.from_config(json.loads((tmp_path / "out/config.json").read_bytes())["quantization_config"])
    config = chosen(bits=3.5, group_size=group_size, quantizer=quantizer)
    assert config.num_bits == stored.num_bits
    assert len({bits for widths in config.num_bits[MODULE].values() for bits in widths}) > 1
    expected, layer = build(stored, **rank), build(config, **rank)
    load(expected, tmp_path / "out")
    load(layer, MODEL)
    parameters = dict(layer.named_parameters())
    assert [parameters.pop(name).numel() for name in ("w13_weight", "w2_weight")] == [1, 1]
    assert parameters.keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        assert parameter.dtype == parameters[name].dtype
        assert torch.equal(parameter, parameters[name]), name


def test_a_layer_is_loaded_again_after_its_parameters_were_lost():
    layer = build(chosen())
    load(layer, MODEL)
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.data.zero_()
    load(layer, MODEL)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name])


NAME = f"{MODULE}.2.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda tensors: tensors.pop(NAME), "expected in the checkpoint, got nothing", id="missing"),
        pytest.param(lambda tensors: tensors.update({NAME: tensors[NAME][1:]}), r"of shape \(127, 128\)", id="shape"),
        pytest.param(lambda tensors: tensors[NAME].fill_(float("nan")), "expected finite values", id="nan"),
        pytest.param(lambda tensors: tensors.update({NAME: tensors[NAME].char()}), "got torch.int8", id="dtype"),
    ],
)  # fmt: skip
def test_a_layer_refuses_a_damaged_matrix(change, message):
    with pytest.raises(ValueError, match=rf"{NAME}: .*{message}"):
        load(build(chosen()), MODEL, change)


@pytest.mark.parametrize("threads", [1, 3])
def test_quantize_in_parts_gives_the_same_bytes(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight = torch.randn(67, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = quantize(weight, 3, 64).tensors("name")
    for scales in (None, scales_of(weight, 3, 64)):
        for suffix, tensor in online._quantize(weight, scales, 3, 64, "mse").items():
            assert torch.equal(tensor, expected[f"name.{suffix}"])


POOL = """
import os, torch
from alphaq_vllm.plugin import online
threads = torch.get_num_threads()
assert len(os.sched_getaffinity(0)) == 1 < threads
cores = list(online._pool(threads).map(lambda _: len(os.sched_getaffinity(0)), range(threads)))
assert cores == [threads] * threads, cores
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_threads_leave_the_core_that_the_loading_one_is_bound_to():
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    subprocess.run([sys.executable, "-c", POOL], env=environment, check=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"bits": 9}, "`bits`: expected an average from 2 to 4", id="bits"),
        pytest.param(
            {"bits": "many"}, "quantization_config of --hf-overrides: `bits`: expected a number", id="not-a-number"
        ),
        pytest.param({"group_size": 48}, "`group_size`: expected one of", id="group-size"),
        pytest.param({"linear_bits": 4}, "expected settings out of bits, .* got linear_bits", id="unknown"),
        pytest.param({"quantizer": "gptq"}, "`quantizer`: expected one of", id="calibrated"),
        pytest.param({"exclude": ["x"]}, "`exclude`: expected a pattern that matches expert matrices", id="exclude"),
        pytest.param({"bits": 3, "mode": "ratio"}, "`mode=ratio`: expected only options that it uses", id="mode"),
        pytest.param({"fit_memory": "1MB"}, "`fit_memory`: expected room for at least", id="memory"),
    ],
)
def test_settings_are_refused_like_options_of_convert(settings, message):
    with pytest.raises(ValueError, match=message):
        chosen(**settings)


def test_settings_choose_what_options_of_convert_choose(tmp_path):
    exclude = ["*.layers.0.*", "*.layers.2.*"]
    config = chosen(mode="uniform", bits=5, candidate_bits=[4, 6], exclude=exclude)
    assert list(config.num_bits) == [MODULE]
    widths = [bits for widths in config.num_bits[MODULE].values() for bits in widths]
    assert set(widths) == {4, 6}
    assert sum(widths) / len(widths) == 5


def test_a_bit_map_is_served_without_measuring(tmp_path, cache):
    names = [name.removesuffix(".weight") for name in load_file(MODEL / "model.safetensors") if ".experts." in name]
    path = tmp_path / "bit_map.json"
    path.write_text(json.dumps({name: 1 + i % 8 for i, name in enumerate(names)}))
    assert {bits for widths in chosen(bit_map=str(path)).num_bits[MODULE].values() for bits in widths} == set(
        range(1, 9)
    )
    assert not cache.exists()
    path.write_text(json.dumps(dict.fromkeys(names[1:], 3)))
    with pytest.raises(ValueError, match=f"bit map: expected all 72 expert matrices, got no width for {names[0]}"):
        chosen(bit_map=str(path))


def log_of(monkeypatch, model, **settings):
    """What the log says of a model that is quantized while it is loaded."""
    lines = []
    monkeypatch.setattr(online.logger, "info", lambda message, *parts: lines.append(message % parts))
    choose_online(str(model), None, settings)
    (line,) = lines
    return line


def test_the_log_says_what_converting_would_add(monkeypatch):
    line = log_of(monkeypatch, MODEL, mode="uniform")
    assert f"python -m offline.convert {MODEL} OUT would choose widths by the errors of the layers' outputs" in line


def test_the_log_promises_nothing_of_a_conversion_that_cannot_run_the_model(monkeypatch):
    monkeypatch.setattr(online, "can_run", lambda experts: False)
    line = log_of(monkeypatch, MODEL, mode="uniform")
    assert "OUT would write these weights once, and serving them starts faster" in line


def test_the_papers_preset_is_that_of_convert(tmp_path):
    convert(MODEL, tmp_path / "out", bits=3, preset="paper", quantizer="mse")
    stored = AlphaQSpec.from_dict(json.loads((tmp_path / "out/config.json").read_bytes())["quantization_config"])
    assert chosen(bits=3, preset="paper").num_bits == stored.num_bits != chosen(bits=3).num_bits


def test_statistics_are_measured_once_for_all_budgets(monkeypatch, cache):
    first = chosen(bits=2.5)
    (path,) = cache.glob("*.csv")
    monkeypatch.setattr(cache_module, "_measure", None)
    assert chosen(bits=2.5).num_bits == first.num_bits
    assert chosen(bits=3.5).num_bits != first.num_bits
    assert [path] == list(cache.glob("*.csv"))


@pytest.mark.parametrize("change", ["group_size", "candidate_bits", "source", "damage"])
def test_statistics_of_something_else_are_not_reused(model, cache, change):
    chosen(model)
    (path,) = cache.glob("*.csv")
    settings = {"group_size": {"group_size": 32}, "candidate_bits": {"candidate_bits": [2, 4]}}.get(change, {})
    if change == "source":
        tensors = load_file(model / "model.safetensors")
        tensors[f"{MODULE}.0.gate_proj.weight"].mul_(2)
        save_file(tensors, model / "model.safetensors")
    before = path.read_bytes()
    if change == "damage":
        path.write_bytes(before[:-100])
    chosen(model, **settings)
    assert path.read_bytes() == before
    assert len(list(cache.glob("*.csv"))) == (1 if change == "damage" else 2)


def test_a_kill_while_measuring_leaves_nothing_to_be_reused(cache):
    process = subprocess.Popen([sys.executable, "-c", CHOOSE, str(MODEL)], start_new_session=True)
    while not list(cache.glob("*/")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(cache.glob("*.csv"))
    assert chosen().num_bits
    assert len(list(cache.glob("*.csv"))) == 1


def test_servers_that_start_together_measure_once(cache):
    command = [sys.executable, "-c", CHOOSE, str(MODEL)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in "ab"]
    logs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs
    assert sorted("statistics measured in" in log for log in logs) == [False, True]
    assert sorted("statistics reused from" in log for log in logs) == [False, True]
    assert len(list(cache.glob("*.csv"))) == 1


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        pytest.param(FP8, "got a checkpoint with quant_method 'fp8'", id="fp8"),
        pytest.param({"quant_method": "alphaq"}, "expected a model that is not quantized yet", id="alphaq"),
    ],
)  # fmt: skip
def test_quantized_sources_are_refused(model, quantization, message):
    edit_config(model, quantization_config=quantization)
    with pytest.raises(ValueError, match=message):
        chosen(model)


def edit_tensors(model, edit):
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors")


DAMAGED = {
    "case 1": (lambda tensors: tensors["model.norm.weight"].fill_(torch.nan), "expected finite weights, got 128 NaN"),
    "case 2": (lambda tensors: tensors.pop("model.norm.weight"), "config.json implies, got none of model.norm.weight"),
    "case 4": (
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)}),
        r"model.norm.weight: expected shape \(128,\) by hidden_size=128",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("settings", [{}, {"mode": "uniform", "bits": 3}])
def test_cases_1_2_and_4_are_refused_before_anything_is_measured(model, cache, name, settings):
    edit, message = DAMAGED[name]
    edit_tensors(model, edit)
    with pytest.raises(ValueError, match=message):
        chosen(model, **settings)
    assert not cache.exists()


def test_case_3_leftovers_in_a_config_change_nothing(model):
    edit_config(model, pad_token_id=10**6, attn_implementation="xformers", torch_dtype="torch.bfloat16")
    assert chosen(model).num_bits == chosen().num_bits


def test_what_is_too_many_is_named_in_the_log(model, monkeypatch):
    lines = []
    monkeypatch.setattr(online.logger, "warning", lambda message, *parts: lines.append(message % parts))
    edit_tensors(model, lambda tensors: tensors.update({"model.more.weight": torch.ones(2)}))
    chosen(model)
    assert "1 tensor that the model does not need, kept as they are: model.more.weight" in lines[0]


def test_vllm_refuses_another_method_with_a_way_out(model):
    edit_config(model, quantization_config=FP8)
    with pytest.raises(ValueError, match=r"got a checkpoint with quant_method 'fp8': run python -m offline\.convert"):
        ModelConfig(str(model), quantization="alphaq")


@pytest.fixture
def fused_model(model):
    """The embedded model with one tensor for all gate and up projections of a layer, and one for all down."""
    tensors = load_file(model / "model.safetensors")
    for module in [f"model.layers.{layer}.mlp.experts" for layer in range(3)]:
        gate, up, down = (
            torch.stack([tensors.pop(f"{module}.{expert}.{name}_proj.weight") for expert in range(8)])
            for name in ("gate", "up", "down")
        )
        tensors |= {f"{module}.gate_up_proj": torch.cat((gate, up), 1), f"{module}.down_proj": down}
    save_file(tensors, model / "model.safetensors")
    return model


def test_fused_experts_are_loaded_one_by_one(fused_model):
    expected, layer = build(chosen()), build(chosen(fused_model))
    load(expected, MODEL)
    load(layer, fused_model)
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, layer.get_parameter(name)), name


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text"])
def test_transposed_experts_are_refused(tmp_path, model_type):
    config = AutoConfig.for_model(model_type, **{**COMMON, **CONFIGS[model_type]})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"experts\.gate_up_proj: expected matrices .* got transposed ones: run python"
    ):
        chosen(tmp_path / "model")


def test_the_choice_reaches_workers_by_pickle():
    config = pickle.loads(pickle.dumps(chosen(bits=3, quantizer="rtn")))
    method = build(config).quant_method
    assert type(method) is online.OnlineMoEMethod
    assert (method.quantizer, method.num_bits["w2"]) == ("rtn", config.num_bits[MODULE]["down_proj"])


def test_compiled_code_is_keyed_by_the_widths(tmp_path):
    path = tmp_path / "bit_map.json"
    names = [name.removesuffix(".weight") for name in load_file(MODEL / "model.safetensors") if ".experts." in name]
    keys = set()
    for bits in (2, 3):
        path.write_text(json.dumps(dict.fromkeys(names, bits)))
        overrides = {"quantization_config": {"quant_method": "alphaq", "bit_map": str(path)}}
        config = ModelConfig(str(MODEL), quantization="alphaq", hf_overrides=overrides)
        VllmConfig._get_quantization_config(config, LoadConfig())
        keys.add(config.compute_hash())
    assert len(keys) == 2


def test_a_converted_checkpoint_is_not_quantized_again():
    spec = AlphaQSpec(128, {MODULE: {"gate_proj": (2,), "up_proj": (3,), "down_proj": (4,)}})
    config = AlphaQConfig.from_config(spec.to_dict())
    config.maybe_update_config("no such model")
    assert config.quantizer is None
