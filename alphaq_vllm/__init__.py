"""AlphaQ for vLLM: Mixture-of-Experts checkpoints in which every expert matrix has a width of its own."""


def register() -> None:
    """Make ``--quantization alphaq`` known to vLLM; the entry point of ``vllm.general_plugins``, safe to call again."""
    from alphaq_vllm.plugin.config import AlphaQConfig  # noqa: F401
