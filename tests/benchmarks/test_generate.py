import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import generate
from offline.model.check import check_source
from offline.source.checkpoint import open_checkpoint
from offline.source.families import code_bits, find_experts, load_weight

LAYERS = 2
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 48,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "vocab_size": 64, "q_lora_rank": 16, "n_group": 1, "topk_group": 1,
}  # fmt: skip


def tensors(model):
    found = {}
    for shard in model.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def raw(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.fixture(params=generate.MODELS)
def name(request, monkeypatch):
    """A model with its own options, small."""
    options = generate.MODELS[request.param]
    monkeypatch.setitem(generate.MODELS, request.param, options | {k: v for k, v in TINY.items() if k in options})
    return request.param


def test_checkpoint_is_as_transformers_saves_it(name, tmp_path):
    if "quantization_config" in generate.MODELS[name]:
        pytest.skip("transformers saves it in bfloat16")
    generate.generate(name, tmp_path / "streamed", LAYERS)
    options = {**generate.COMMON, **generate.MODELS[name], "num_hidden_layers": LAYERS}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    streamed, saved = tensors(tmp_path / "streamed"), tensors(tmp_path / "saved")
    assert {k: (v.shape, v.dtype) for k, v in streamed.items()} == {k: (v.shape, v.dtype) for k, v in saved.items()}
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "streamed" / file).read_text() == (tmp_path / "saved" / file).read_text()
    # What transformers does not draw at random: norms are one, biases are zero.
    for key, tensor in saved.items():
        if tensor.dim() == 1:
            assert torch.equal(streamed[key], tensor)
        else:
            assert streamed[key].float().std() > 0


def test_tensors_follow_from_name_and_seed_however_they_are_sharded(name, tmp_path, monkeypatch):
    generate.generate(name, tmp_path / "one", LAYERS, seed=1)
    monkeypatch.setattr(generate, "SHARD", 20_000)
    generate.generate(name, tmp_path / "many", LAYERS + 1, seed=1)
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert all(torch.equal(raw(tensor), raw(many[key])) for key, tensor in one.items())
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == many.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in many.values())
    shards = list((tmp_path / "many").glob("*.safetensors"))
    assert {shard.name for shard in shards} == set(index["weight_map"].values())
    assert len(shards) > 2
    assert all(shard.stat().st_size < 40_000 for shard in shards)
    generate.generate(name, tmp_path / "other", LAYERS, seed=2)
    other = tensors(tmp_path / "other")
    assert all(not torch.equal(raw(tensor), raw(one[key])) for key, tensor in other.items() if tensor.dim() > 1)


def test_fp8_is_as_published(tmp_path, monkeypatch):
    options = generate.MODELS["deepseek-v3"]
    monkeypatch.setitem(generate.MODELS, "deepseek-v3", options | {k: v for k, v in TINY.items() if k in options})
    generate.generate("deepseek-v3", tmp_path, 1)
    source = open_checkpoint(str(tmp_path))
    experts = find_experts(source)
    check_source(source, experts)
    assert code_bits(source, experts) == 8
    weight = load_weight(source, experts.matrices[0])
    assert 0.005 < float(weight.std()) < 0.1
