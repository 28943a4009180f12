"""AlphaQ for vLLM: Mixture-of-Experts checkpoints in which every expert matrix has a width of its own.

Importing this also lets ``from_pretrained`` of transformers load such checkpoints, whichever of the two is imported
first, without importing transformers.
"""

from alphaq_vllm.transformers_registry import register_when_imported


def register() -> None:
    """Make ``--quantization alphaq`` known to vLLM; the entry point of ``vllm.general_plugins``, safe to call again.

    Warns of a version of vLLM that was not tested. Raises ImportError for one without the interface that is needed.
    """
    from alphaq_vllm.plugin._compat import ModelRegistry, check_interface, check_version

    check_version()
    check_interface()
    from alphaq_vllm.plugin.config import AlphaQConfig  # noqa: F401

    ModelRegistry.register_model("GptOssForCausalLM", "alphaq_vllm.plugin.gpt_oss:GptOssForCausalLM")


register_when_imported()
