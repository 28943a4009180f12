import pytest
import torch
from safetensors.torch import save_file

from benchmarks import generate, llama_cpp
from tests.benchmarks.test_generate import TINY, tensors

LAYER = (
    "attn_norm.weight", "attn_q.weight", "attn_q.bias", "attn_k.weight", "attn_k.bias", "attn_v.weight", "attn_v.bias",
    "attn_output.weight", "ffn_norm.weight", "ffn_gate_inp.weight", "ffn_gate_exps.weight", "ffn_up_exps.weight",
    "ffn_down_exps.weight", "ffn_gate_inp_shexp.weight", "ffn_gate_shexp.weight", "ffn_up_shexp.weight",
    "ffn_down_shexp.weight",
)  # fmt: skip


@pytest.fixture
def model(tmp_path, monkeypatch):
    options = generate.MODELS["qwen1.5-moe-a2.7b"]
    monkeypatch.setitem(generate.MODELS, "qwen1.5-moe-a2.7b", options | {k: TINY[k] for k in TINY if k in options})
    generate.generate("qwen1.5-moe-a2.7b", tmp_path, 2)
    return tmp_path


def test_every_tensor_has_its_place(model):
    found = llama_cpp.sources(tensors(model))
    layers = {f"blk.{layer}.{name}" for layer in range(2) for name in LAYER}
    assert found.keys() == layers | {"token_embd.weight", "output_norm.weight", "output.weight"}
    assert sorted(name for parts in found.values() for name in parts) == sorted(tensors(model))
    assert all(len(parts) == (TINY["num_experts"] if "_exps" in name else 1) for name, parts in found.items())


def test_experts_are_in_the_order_of_their_numbers():
    names = [f"model.layers.0.mlp.experts.{expert}.up_proj.weight" for expert in range(12)]
    assert llama_cpp.sources(sorted(names)) == {"blk.0.ffn_up_exps.weight": names}


def test_read_gives_the_bits_of_a_checkpoint(model):
    found, expected = llama_cpp.read(model), tensors(model)
    assert found.keys() == expected.keys()
    for name, bits in found.items():
        assert torch.equal(torch.from_numpy(bits.copy()).view(torch.bfloat16), expected[name])


def test_read_refuses_other_types(tmp_path):
    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight: expected BF16, got F32"):
        llama_cpp.read(tmp_path)
