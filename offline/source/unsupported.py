"""Types of Mixture-of-Experts models that cannot be converted, each with what stands in the way: messages say it."""

_STEP = "vLLM loads its experts only from tensors that hold them all"
_MINIMAX_M3 = "vLLM knows the config of `minimax_m3_vl` alone, of which this is the language model"
_DEEPSEEK_V41 = (
    "vLLM loads its tables of n-grams in fp8 alone, which a conversion writes in bfloat16, and does not tell a method "
    "of quantization how it renames its experts"
)
_INKLING = "vLLM loads its experts by code of its own, from tensors that hold them all"

REASONS = {
    "aria": "its experts lie in tensors `fc1` and `fc2` of a layout that is not read here",
    "aria_text": "its experts lie in tensors `fc1` and `fc2` of a layout that is not read here",
    "dbrx": "its experts lie in tensors of two dimensions that are not read here",
    "deepseek_v41": _DEEPSEEK_V41,
    "diffusion_gemma": "it denoises whole blocks of text, and only models that predict the next token are served here",
    "ernie4_5_vl_moe": "it has two sets of experts of different sizes, and a bit map has one",
    "inkling_mm_model": _INKLING,
    "inkling_text": _INKLING,
    "kimi_k3": "its experts work on vectors of another size than the model's, with an activation not computed here",
    "longcat_flash": "some of its experts are empty and only pass their input on",
    "minimax_m3": _MINIMAX_M3,
    "minimax_m3_text": _MINIMAX_M3,
    "step3_text": _STEP,
    "step3_vl": _STEP,
}
