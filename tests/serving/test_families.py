"""Every family: a checkpoint that transformers wrote, converted and loaded by vLLM, against the dequantized weights."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from alphaq_vllm import convert, dequantize
from benchmarks.models import SERVED
from offline.source import architectures
from offline.source.checkpoint import SINGLE, open_checkpoint
from offline.source.families import find_experts
from tests.offline import own_code
from tests.offline.conftest import COMMON, CONFIGS, WRITTEN_AS, has_head, publish, rename, transposed
from tests.serving.scoring import PROMPT, score, score_with_code, score_without_gate

ON_GPU = torch.cuda.is_available()
# What vLLM's kernels for latent attention ask for.
MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
HYBRID = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
# What else vLLM reads of a config.
OPTIONS = {
    "deepseek_v2": {**MLA, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": {**MLA, "topk_method": "noaux_tc"},
    "llama4_text": {"attention_chunk_size": 128},
    "llama4": {"attention_chunk_size": 128},
    "qwen3_5_moe": HYBRID,
    "qwen3_5_moe_text": HYBRID,
    "qwen3_next": HYBRID,
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    # Experts on latents; three groups of 64.
    "nemotron_h": {"moe_latent_size": 64, "moe_intermediate_size": 192},
    "kimi_k2": {**MLA, "topk_method": "noaux_tc"},
    "glm4_moe_lite": MLA,
    "axk1": MLA,
    "afmoe": {"score_func": "sigmoid", "route_scale": 1.0, "route_norm": True, "n_group": 1, "topk_group": 1},
    "cohere2_moe": {"logit_scale": 1.0},
    # vLLM has no kernel for this family's own scores, sigmoid without groups, on CPUs.
    "minimax_m2": {"rotary_dim": 16, "use_routing_bias": True, "scoring_func": "sigmoid" if ON_GPU else "softmax"},
}
# What published checkpoints have in their configs where transformers writes something else.
PUBLISHED = {
    "phimoe": {"architectures": ["PhiMoEForCausalLM"]},
    "nemotron_h": {"hybrid_override_pattern": "E*ME", "num_hidden_layers": 4},
    "axk1": {"topk_method": "noaux_tc"},
    "qwen3_vl_moe": {"text_config": {"norm_topk_prob": True}},
    "hy_v3": {"expert_hidden_dim": 128, "route_norm": True, "qk_norm": True},
    "qwen3_omni_moe": {
        "thinker_config": {
            "text_config": {"tie_word_embeddings": False},
            # Of 48 by 48 patches.
            "vision_config": {"image_size": 768, "apply_vit_abs_pos_embed": True},
        }
    },
}
# What vLLM makes for a model and does not use, but misses where it is not stored in full precision.
UNUSED = {"axk1": {"model.layers.0.post_mlp_layernorm.weight": torch.ones(128)}}
# vLLM and transformers differ on these models as they are, or in dtype or scores: vLLM is compared with itself.
VLLM_ALONE = (
    "deepseek_v2", "deepseek_v3", "llama4", "minimax_m2", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next", "kimi_k2",
    "glm4_moe_lite", "granitemoehybrid", "afmoe", "ernie4_5_moe", "lfm2_moe", "axk1",
    "qwen3_vl_moe", "gemma4", "qwen3_omni_moe", *own_code.CONFIGS,
)  # fmt: skip
# vLLM's kernels for linear attention on CPUs take nothing else.
BFLOAT16 = ("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next")
# vLLM's code for models that see imports torchvision. These are asked in text alone.
TORCHVISION = ("llama4", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_vl_moe", "gemma4", "qwen3_omni_moe")
ALWAYS = ("mixtral", "qwen2_moe", "deepseek_v2", "olmoe", "gpt_oss")


@torch.inference_mode()
def scored_by_transformers(model):
    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = torch.tensor([PROMPT])
    return net(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


def save_model(model_type, folder):
    """A model whose weights are large enough for its experts to matter."""
    torch.manual_seed(0)
    options, auto = CONFIGS[model_type], transformers.AutoModelForCausalLM
    more = {**OPTIONS.get(model_type, {}), "initializer_range": 0.1}
    if "text_config" in options:
        options, auto = dict(options), transformers.AutoModelForImageTextToText
        options["text_config"] = {**options["text_config"], **more}
    elif "thinker_config" in options:
        thinker, auto = options["thinker_config"], transformers.AutoModelForMultimodalLM
        options = {**options, "thinker_config": {**thinker, "text_config": {**thinker["text_config"], **more}}}
    else:
        options = {**COMMON, **options, **more}
    config = transformers.AutoConfig.for_model(WRITTEN_AS.get(model_type, model_type), **options)
    model = auto.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        # vLLM loads PhiMoE's bias of the head, and does not add it.
        if name.endswith("bias") and name != "lm_head.bias":
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    if model_type == "qwen3_vl_moe":
        tensors, _ = transposed(load_file(folder / SINGLE), {})
        save_file(tensors, folder / SINGLE, {"format": "pt"})
    if model_type in UNUSED:
        tensors = {**load_file(folder / SINGLE), **UNUSED[model_type]}
        save_file(tensors, folder / SINGLE, {"format": "pt"})
    if model_type in own_code.CONFIGS:
        rename(folder, model_type)
        own_code.add_config_code(folder)
    publish(folder, {"model_type": model_type, **PUBLISHED.get(model_type, {})})


@pytest.mark.parametrize(
    "model_type", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.long) for name in SERVED]
)
def test_vllm_gives_the_log_probabilities_of_the_dequantized_model(model_type, vllm, seeing_vllm, tmp_path):
    source, checkpoint, dequantized = (tmp_path / name for name in ("source", "checkpoint", "dequantized"))
    save_model(model_type, source)
    matrices = find_experts(open_checkpoint(str(source))).matrices
    convert(
        source,
        checkpoint,
        bit_map={matrix.name: 2 + i % 7 for i, matrix in enumerate(matrices)},
        group_size=64,
        quantizer="mse",
        head_bits=8 if has_head(source) else 16,
    )
    dequantize(str(checkpoint), dequantized, dtype="float32")
    dtype = "float16" if ON_GPU else "bfloat16" if model_type in BFLOAT16 else "float32"
    arguments = {"dtype": dtype}
    if "kv_lora_rank" in CONFIGS[model_type] and not ON_GPU:
        # The kernels that vLLM prefers on a CPU with AMX do not take float32.
        arguments["attention_backend"] = "CPU_MLA"

    processes = seeing_vllm if model_type in TORCHVISION else vllm
    family = architectures.FAMILIES[model_type]
    by_vllm = score_with_code if family.own_code else score if family.gated else score_without_gate

    def scored_by_vllm(model):
        return torch.tensor(processes.submit(by_vllm, model, arguments).result())

    reference = scored_by_vllm if model_type in VLLM_ALONE else scored_by_transformers
    served, expected, original = scored_by_vllm(checkpoint), reference(dequantized), reference(source)
    assert (expected - original).abs().mean() > 0.02
    difference = (served - expected).abs()
    assert difference.mean() < 0.02
    if dtype == "float32":
        assert difference.max() < 0.002
