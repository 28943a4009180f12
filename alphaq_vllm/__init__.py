"""AlphaQ for vLLM: Mixture-of-Experts checkpoints in which every expert matrix has a width of its own."""


def register() -> None:
    """Make ``--quantization alphaq`` known to vLLM; the entry point of ``vllm.general_plugins``, safe to call again.

    Warns of a version of vLLM that was not tested. Raises ImportError for one without the interface that is needed.
    """
    from alphaq_vllm.plugin._compat import check_interface, check_version

    check_version()
    check_interface()
    from alphaq_vllm.plugin.config import AlphaQConfig  # noqa: F401
