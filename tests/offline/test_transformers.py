"""``from_pretrained`` on AlphaQ checkpoints: the values of ``offline.dequantize``, in an ordinary model."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import alphaq_vllm.transformers  # noqa: F401
from alphaq_vllm import convert, dequantize
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts
from tests.offline.conftest import has_head

FAMILIES = (
    "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "qwen3_next", "qwen3_5_moe_text",
    "qwen3_5_moe", "glm4_moe", "phimoe", "minimax_m2", "granitemoe", "granitemoeshared", "gpt_oss", "llama4_text",
    "llama4", "nemotron_h", "qwen3_vl_moe",
)  # fmt: skip
EXPERT = "model.layers.1.mlp.experts.2.up_proj"


@pytest.fixture(scope="session")
def quantized(tiny_model, tmp_path_factory):
    """``quantized(model_type, linear_bits)``: a tiny checkpoint with every width, not to be changed."""
    made = {}

    def make(model_type, linear_bits=16):
        if (model_type, linear_bits) not in made:
            source, out = tiny_model(model_type), tmp_path_factory.mktemp("quantized") / model_type
            names = sorted(matrix.name for matrix in find_experts(open_checkpoint(str(source))).matrices)
            widths = {name: 1 + i % 8 for i, name in enumerate(names)}
            head_bits = linear_bits if has_head(source) else 16
            convert(
                source,
                out,
                bit_map=widths,
                group_size=32,
                linear_bits=linear_bits,
                head_bits=head_bits,
                quantizer="mse",
            )
            made[model_type, linear_bits] = out
        return made[model_type, linear_bits]

    return make


@pytest.fixture
def checkpoint(quantized, tmp_path):
    """A copy of the tiny AlphaQ Qwen2-MoE, to be damaged."""
    return shutil.copytree(quantized("qwen2_moe"), tmp_path / "checkpoint")


def load(path, **options):
    vision = "vision_config" in json.loads((path / "config.json").read_bytes())
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    return auto.from_pretrained(path, **options)


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("linear_bits", [16, 8, 4])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_from_pretrained_gives_the_dequantized_model(quantized, tmp_path, model_type, linear_bits):
    path = quantized(model_type, linear_bits)
    dequantize(str(path), tmp_path / "plain")
    model, expected = load(path), load(tmp_path / "plain")
    assert_equal(model.state_dict(), expected.state_dict())
    model.save_pretrained(tmp_path / "saved")
    expected.save_pretrained(tmp_path / "expected")
    assert_equal(load_file(tmp_path / "saved/model.safetensors"), load_file(tmp_path / "expected/model.safetensors"))
    assert (tmp_path / "saved/config.json").read_bytes() == (tmp_path / "expected/config.json").read_bytes()


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral", "granitemoe"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_from_pretrained_respects_the_dtype(quantized, tmp_path, model_type, dtype):
    path = quantized(model_type, 8)
    dequantize(str(path), tmp_path / "plain", dtype=dtype)
    model, expected = (load(folder, dtype=getattr(torch, dtype)) for folder in (path, tmp_path / "plain"))
    assert model.dtype == getattr(torch, dtype)
    assert_equal(model.state_dict(), expected.state_dict())
    tokens = torch.arange(3, 35)[None]
    assert torch.equal(model(tokens).logits, expected(tokens).logits)
    answers = [each.generate(tokens, max_new_tokens=8, do_sample=False) for each in (model, expected)]
    assert answers[0].shape[1] > 32
    assert torch.equal(*answers)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_from_pretrained_respects_the_device_map(quantized, device_map):
    pytest.importorskip("accelerate")
    model = load(quantized("qwen2_moe", 8), device_map=device_map)
    assert_equal(model.cpu().state_dict(), load(quantized("qwen2_moe", 8)).state_dict())


def test_from_pretrained_leaves_excluded_experts_as_they_are(tiny_model, tmp_path):

    source = tiny_model("qwen2_moe")
    convert(
        source, tmp_path / "out", bits=3, noise="measured", group_size=32, exclude=("*.layers.0.*",), quantizer="mse"
    )
    name = "model.layers.{}.mlp.experts.down_proj"
    model, original = load(tmp_path / "out").state_dict(), load(source).state_dict()
    assert torch.equal(model[name.format(0)], original[name.format(0)])
    assert not torch.equal(model[name.format(1)], original[name.format(1)])


def change_tensors(path, change):
    (shard,) = path.glob("*.safetensors")
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard.name)}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_from_pretrained_refuses_a_missing_buffer(quantized, tmp_path):
    path = shutil.copytree(quantized("deepseek_v3"), tmp_path / "checkpoint")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    change_tensors(path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"{name}: expected in the checkpoint, got nothing"):
        load(path)


LIES = {
    "missing": (lambda t: t.pop(f"{EXPERT}.weight_scale"), rf"got none of {EXPERT}\.weight_scale"),
    "extra": (lambda t: t.update({f"{EXPERT}.weight": torch.zeros(2)}), rf"got also {EXPERT}\.weight"),
    "shape": (
        lambda t: t.update({f"{EXPERT}.weight_packed": t[f"{EXPERT}.weight_packed"][:, 1:].clone()}),
        rf"{EXPERT}\.weight_packed: expected",
    ),
    "nan": (lambda t: t[f"{EXPERT}.weight_scale"].fill_(float("nan")), rf"{EXPERT}\.weight_scale: expected finite"),
    "missing-plain": (
        lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"),
        r"model\.layers\.1\.self_attn\.q_proj\.weight: expected in the checkpoint, got nothing",
    ),
    "shape-plain": (
        lambda t: t.update({"model.norm.weight": torch.ones(64)}),
        r"model\.norm\.weight: expected shape \(128,\) as config\.json says, got \(64,\)",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_from_pretrained_refuses_what_lies(checkpoint, lie):
    change, message = LIES[lie]
    change_tensors(checkpoint, change)
    with pytest.raises(ValueError, match=message):
        load(checkpoint)


def test_from_pretrained_refuses_a_newer_format(checkpoint):
    config = json.loads((checkpoint / "config.json").read_bytes())
    config["quantization_config"]["format_version"] = 2
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format_version: this alphaq-vllm reads up to 1, got 2: upgrade alphaq-vllm"):
        load(checkpoint)


def test_from_pretrained_refuses_ranks_that_share_the_model(quantized, monkeypatch):
    config = transformers.AutoConfig.from_pretrained(quantized("qwen2_moe"))
    config.distributed_config = {"tp_size": 2}
    with pytest.raises(ValueError, match="distributed_config, tp_plan: expected none for an AlphaQ checkpoint"):
        load(quantized("qwen2_moe"), config=config)


ORDERS = {
    "alphaq-first": "import alphaq_vllm.transformers; from transformers import AutoModelForCausalLM",
    "alphaq-last": "from transformers import AutoModelForCausalLM; import alphaq_vllm.transformers",
    "after-the-registry": (
        "import transformers.quantizers.auto, alphaq_vllm.transformers; from transformers import AutoModelForCausalLM"
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_imports_does_not_matter(quantized, order):
    code = f"import sys; {ORDERS[order]}; AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(quantized("qwen2_moe"))], check=True)


@pytest.mark.parametrize("without", ["", "import alphaq_vllm;"])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral", "granitemoe", "gpt_oss", "llama4_text"])
def test_case_10_without_the_import_from_pretrained_names_it(quantized, model_type, without):
    code = f"import sys; {without} from transformers import AutoModelForCausalLM as M; M.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-c", code, str(quantized(model_type))]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode
    assert finished.stderr.strip().endswith(": import alphaq_vllm.transformers before from_pretrained")


def test_what_else_transformers_reads_needs_no_import(quantized):
    code = "import sys; from transformers import AutoConfig; print(AutoConfig.from_pretrained(sys.argv[1]).hidden_size)"
    subprocess.run([sys.executable, "-c", code, str(quantized("qwen2_moe"))], check=True)


def test_importing_alphaq_vllm_imports_nothing_heavy():
    code = """
import sys, alphaq_vllm
sys.exit(any(name in sys.modules for name in ("torch", "numpy", "transformers", "triton", "vllm", "offline")))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("blocked", ["transformers", "vllm", "triton"])
def test_importing_alphaq_vllm_works_without(blocked):
    code = "import sys; sys.modules[sys.argv[1]] = None; import alphaq_vllm, alphaq_vllm.packing"
    subprocess.run([sys.executable, "-c", code, blocked], check=True)


def test_transformers_without_the_interface_is_named():
    code = """
from transformers.quantizers.base import HfQuantizer
del HfQuantizer.update_weight_conversions
import alphaq_vllm.transformers
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: AlphaQ checkpoints need transformers 5.19 or newer, got " in finished.stderr


def test_nobody_is_patched_and_nothing_waits_for_imports():
    code = """
import sys
finders = list(sys.meta_path)
import alphaq_vllm
alphaq_vllm.register()
assert sys.meta_path[-len(finders):] == finders
assert not [f for f in sys.meta_path if type(f).__module__.startswith("alphaq_vllm")]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
