"""Lets ``from_pretrained`` of transformers load AlphaQ checkpoints, whichever of the two is imported first.

    import alphaq_vllm.transformers

Without it, transformers refuses them: ``config.json`` names no file that it could take the weights from.

Raises ImportError, when imported, for a version of transformers that lacks what it needs.
"""

from __future__ import annotations

import transformers
from transformers.quantizers.base import HfQuantizer

OLDEST = "5.19"

if not hasattr(HfQuantizer, "update_weight_conversions"):
    raise ImportError(
        f"AlphaQ checkpoints need transformers {OLDEST} or newer, got {transformers.__version__}: upgrade it, or run "
        "python -m offline.dequantize CHECKPOINT OUT and load OUT"
    )

# Registers the quantizer.
from alphaq_vllm import transformers_quantizer  # noqa: E402, F401
