"""Types of Mixture-of-Experts models that vLLM serves and that cannot be converted, each with the reason."""

_NO_GATE = "its experts have no gate, and the format stores gate, up and down"
_NO_CODE = "vLLM serves it on GPUs only, by code of its own with names of its own, and nobody has tried it"
_EIGHT = "vLLM has its own code for it, which does not build the experts that AlphaQ replaces"

REASONS: dict[str, str] = {}
