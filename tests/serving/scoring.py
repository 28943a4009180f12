"""What vLLM makes of a prompt, without a server: for processes that end with it."""

import os
from pathlib import Path

PROMPT = list(range(3, 63))


def score(model, arguments):
    """The log-probabilities of the prompt's tokens but the first."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    sizes = {"max_model_len": 128, "max_num_seqs": 2}
    text = {"language_model_only": True, "skip_tokenizer_init": True}
    llm = LLM(str(model), enforce_eager=True, **arguments, **sizes, **text)
    options = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate({"prompt_token_ids": PROMPT}, options)
    return [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], PROMPT[1:], strict=True)]


def score_without_gate(model, arguments):
    """The same of a model whose experts have no gate, which vLLM refuses on CPUs: its own kernels there have none."""
    from types import SimpleNamespace

    from vllm.model_executor.layers.fused_moe import config

    if config.current_platform.is_cpu():
        config.current_platform = SimpleNamespace(is_cuda_alike=lambda: True, is_xpu=lambda: False)
    return score(model, arguments)


def score_with_code(model, arguments):
    """The same of a model with code of its own, which transformers copies before it runs it."""
    from transformers import dynamic_module_utils

    dynamic_module_utils.HF_MODULES_CACHE = str(Path(model).parent / "modules")
    return score(model, {**arguments, "trust_remote_code": True})
