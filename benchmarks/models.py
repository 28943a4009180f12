"""README's table of models: every family, what converting it does by default, and how vLLM takes it.

    python -m benchmarks.models

The default is what the converter's own code says of a type of model. What vLLM takes is what the tests show: they run
over the types that are listed here.
"""

from __future__ import annotations

import math
from pathlib import Path

from offline.model.skeleton import built_type
from offline.source.architectures import FAMILIES
from offline.source.checkpoint import Checkpoint

# How people call the models of each type.
NAMES = {
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen1.5 and 2",
    "qwen3_moe": "Qwen3",
    "qwen3_next": "Qwen3-Next",
    "qwen3_vl_moe": "Qwen3-VL",
    "qwen3_5_moe": "Qwen3.5 and 3.6",
    "qwen3_5_moe_text": "Qwen3.5 and 3.6 (text)",
    "qwen3_omni_moe": "Qwen3-Omni",
    "olmoe": "OLMoE",
    "flex_olmo": "FlexOlmo",
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3",
    "deepseek_v32": "DeepSeek-V3.2",
    "deepseek_v4": "DeepSeek-V4",
    "kimi_k2": "Kimi-K2",
    "kimi_linear": "Kimi-Linear",
    "glm4_moe": "GLM-4.5 to 4.7",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "glm_moe_dsa": "GLM-5",
    "gemma4": "Gemma-4",
    "gemma4_text": "Gemma-4 (text)",
    "phimoe": "Phi-3.5-MoE",
    "minimax_m2": "MiniMax-M2",
    "minimax_m3_vl": "MiniMax-M3",
    "granitemoe": "Granite-3",
    "granitemoeshared": "Granite-3",
    "granitemoehybrid": "Granite-4",
    "granitemoe_swa": "Granite-4",
    "lfm2_moe": "LFM2",
    "jamba": "Jamba",
    "ernie4_5_moe": "ERNIE-4.5",
    "hunyuan_v1_moe": "Hunyuan",
    "hy_v3": "HY3",
    "afmoe": "AFM",
    "exaone_moe": "EXAONE",
    "cohere2_moe": "Cohere",
    "solar_open": "Solar",
    "mellum": "Mellum",
    "dots1": "dots",
    "mimo_v2_flash": "MiMo-V2-Flash",
    "laguna": "Laguna",
    "axk1": "A.X",
    "step3p5": "Step-3.5",
    "step3p7": "Step-3.7",
    "dots3_note": "dots3",
    "deepseek": "DeepSeekMoE",
    "bailing_moe": "Ling and Ring",
    "bailing_moe_v2": "Ling and Ring",
    "bailing_hybrid": "Ling and Ring",
    "mimo_v2": "MiMo-V2",
    "sarvam_moe": "Sarvam",
    "sarvam_mla": "Sarvam",
    "llama4": "Llama-4",
    "llama4_text": "Llama-4",
    "gpt_oss": "gpt-oss",
    "nemotron_h": "Nemotron-3",
    "nemotron_h_omni": "Nemotron-3 Omni",
    "NemotronH_Nano_Omni_Reasoning_V3": "Nemotron-3 Omni",
}
# Those that tests/serving/test_families.py serves; of models that see, the text.
SERVED = (
    "mixtral", "qwen2_moe", "deepseek_v2", "olmoe", "gpt_oss", "deepseek_v3", "glm4_moe", "granitemoe",
    "granitemoeshared", "llama4", "llama4_text", "minimax_m2", "nemotron_h", "phimoe", "qwen3_5_moe",
    "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "kimi_k2", "glm4_moe_lite", "solar_open", "gemma4_text", "lfm2_moe",
    "granitemoehybrid", "granitemoe_swa", "ernie4_5_moe", "hunyuan_v1_moe", "afmoe", "exaone_moe", "cohere2_moe",
    "mellum", "flex_olmo", "hy_v3", "dots1", "axk1", "gemma4",
    "qwen3_vl_moe", "qwen3_omni_moe", "deepseek", "bailing_moe", "bailing_moe_v2", "sarvam_moe", "sarvam_mla",
)  # fmt: skip
# Those that tests/plugin/test_online_families.py quantizes at load.
AT_LOAD = (
    "qwen2_moe", "qwen3_moe", "qwen3_next", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "phimoe",
    "granitemoe", "granitemoeshared", "minimax_m2", "nemotron_h", "qwen3_5_moe_text", "kimi_k2", "glm4_moe_lite",
    "gemma4_text", "granitemoehybrid", "granitemoe_swa", "lfm2_moe", "ernie4_5_moe", "hunyuan_v1_moe", "afmoe",
    "exaone_moe", "cohere2_moe", "solar_open", "mellum", "flex_olmo", "hy_v3", "dots1", "deepseek_v32", "glm_moe_dsa",
    "jamba", "laguna", "mimo_v2_flash", "kimi_linear", "step3p5", "axk1", "deepseek", "bailing_moe", "bailing_moe_v2",
    "bailing_hybrid", "mimo_v2", "sarvam_moe", "sarvam_mla",
)  # fmt: skip
# Of those that are served, what vLLM's CPU build refuses as published: experts without a gate, and scores by sigmoid
# without groups.
ALTERED = ("minimax_m2", "nemotron_h")
# What else it refuses, also in full precision: attention, norms, state-space layers, scores or experts without a gate
# that only GPUs have.
REFUSED = (
    "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "kimi_linear", "jamba", "laguna", "mimo_v2_flash", "step3p5",
    "bailing_hybrid", "mimo_v2", "minimax_m3_vl", "step3p7", "dots3_note", "nemotron_h_omni",
    "NemotronH_Nano_Omni_Reasoning_V3",
)  # fmt: skip
# Types in a row.
_MOST = 10


def default(model_type: str) -> str:
    """Options that ``convert`` takes for a type of model, unless others are given."""
    source = Checkpoint(Path(), {"model_type": model_type}, (), {})
    return "propagated + gptq" if built_type(source) else "expert + mse"


def at_load(model_type: str) -> str:
    """Whether vLLM quantizes a type of model while loading it."""
    family = FAMILIES[model_type]
    if family.fused.transposed:
        return "no: convert first"
    return "yes" if model_type in AT_LOAD else "not tested"


def on_cpus(model_type: str) -> str:
    """Whether vLLM's CPU build serves a type of model as it is published."""
    if model_type in (*ALTERED, *REFUSED):
        return "no"
    return "yes" if model_type in SERVED else "not tested"


def table() -> list[str]:
    """The lines of a Markdown table of all families: alike ones beside each other, those first that can most."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for model_type in FAMILIES:
        alike.setdefault((default(model_type), at_load(model_type), on_cpus(model_type)), []).append(model_type)
    alike = dict(sorted(alike.items(), key=lambda item: item[0].count("yes"), reverse=True))
    head = ["family", "`model_type`", "default when converting", "quantized at load", "served on CPUs"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for cells, types in alike.items():
        number = math.ceil(len(types) / _MOST)
        for i in range(number):
            row = types[i * len(types) // number : (i + 1) * len(types) // number]
            names = dict.fromkeys(NAMES[model_type] for model_type in row)
            lines.append(f"| {', '.join(names)} | {', '.join(f'`{name}`' for name in row)} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
