"""A checkpoint with the true layer shapes of a known model, few layers, and random weights.

    python -m benchmarks.generate mixtral-8x7b OUT [--layers 1]

For speed, memory and loading; nothing about quality can be learned from random weights. The tokenizer is that of the
embedded model. Weights are written shard by shard, so that a model takes disk and no memory.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion

SHARD = 500_000_000
TOKENIZER = Path(__file__).parents[1] / "tests" / "models" / "docs-moe"
COMMON = {"max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
# From the config.json of each model. DeepSeek-V2-Lite's first layer is dense. So are three of DeepSeek-V3, left out.
MODELS = {
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "sliding_window": None,
    },
    "qwen1.5-moe-a2.7b": {
        "model_type": "qwen2_moe",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 151936,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "vocab_size": 102400,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 0,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "vocab_size": 129280,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    },
}
# Matrices that are not quantized where others are in 8 bits.
PLAIN = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")


def generate(name: str, out: Path, layers: int, seed: int = 0) -> None:
    """Write the checkpoint, bfloat16, or fp8 in blocks as published; a tensor follows from its name and ``seed`` alone.

    Raises ValueError if ``layers`` leaves no layer of experts.
    """
    options = {**COMMON, **MODELS[name]}
    quantization = options.pop("quantization_config", None)
    if layers <= options.get("first_k_dense_replace", 0):
        raise ValueError(f"--layers: expected more than {options['first_k_dense_replace']} for {name}, got {layers}")
    config = AutoConfig.for_model(options.pop("model_type"), num_hidden_layers=layers, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    if quantization:
        model.config.quantization_config = quantization
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    # As transformers saves them: one tensor for each matrix of an expert, which here is a view of all of them.
    views = revert_weight_conversion(model, model.state_dict())
    tensors = {name: torch.empty(view.shape, dtype=view.dtype, device="meta") for name, view in views.items()}
    if quantization:
        tensors |= _in_8_bits(tensors, quantization["weight_block_size"])
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD)
    for filename, names in split.filename_to_tensors.items():
        shard = {name: _random(name, tensors[name], config.initializer_range, seed) for name in names}
        save_file(shard, out / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(out)


def _in_8_bits(tensors: dict[str, torch.Tensor], block: list[int]) -> dict[str, torch.Tensor]:
    """Matrices as they lie in a checkpoint of fp8 blocks, with their scales."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and not name.endswith(PLAIN):
            found[name] = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn, device="meta")
            blocks = [-(-side // size) for side, size in zip(tensor.shape, block, strict=True)]
            found[f"{name}_scale_inv"] = torch.empty(blocks, dtype=torch.float32, device="meta")
    return found


def _random(name: str, like: torch.Tensor, scale: float, seed: int) -> torch.Tensor:
    """Values of a tensor; rows of a matrix differ in scale, so that groups and matrices do not look alike."""
    tensor = torch.empty(like.shape, dtype=like.dtype)
    if like.dim() == 1:
        return tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
    if tensor.dtype == torch.float8_e4m3fn:
        # The greatest of a block is near the greatest that there is.
        return torch.empty(like.shape).normal_(0, 100, generator=generator).clamp_(-448, 448).to(tensor.dtype)
    if name.endswith("_scale_inv"):
        return tensor.normal_(0, 0.3, generator=generator).exp_().mul_(scale / 100)
    rows = torch.empty(*like.shape[:-1], 1, dtype=like.dtype).normal_(0, 0.3, generator=generator).exp_()
    return tensor.normal_(0, scale, generator=generator).mul_(rows)


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    return parser


def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    generate(args.model, args.out, args.layers)


if __name__ == "__main__":
    main()
