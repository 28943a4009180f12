"""What vLLM calls the experts of layers for multi-token prediction, where that is not the checkpoint's name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from alphaq_vllm.plugin._compat import num_decoder_layers


def draft_module(prefix: str, modules: Iterable[str]) -> str | None:
    """The one of ``modules`` whose experts vLLM calls ``prefix`` in a model that drafts; None if there is none.

    modules: of the bit map, as vLLM's model that does not draft has renamed them.
    """
    return next((module for module in modules if _prefix(module) == prefix), None)


def _prefix(module: str) -> str | None:
    """vLLM's name for a module of experts under ``mtp``, or None where it keeps its own.

    >>> _prefix("language_model.model.mtp.layers.0.transformer_layer.block_sparse_moe.experts")
    'model.layers.0.block_sparse_moe.experts'
    """
    if match := re.fullmatch(r"model\.mtp\.(\d+)\.(ffn\.experts)", module):
        # DeepSeek-V4: numbered after the decoder's layers.
        return f"model.layers.{num_decoder_layers() + int(match[1])}.{match[2]}"
    if match := re.fullmatch(r"language_model\.(model\.)mtp\.(layers\.\d+\.)transformer_layer\.(.+)", module):
        # MiniMax-M3: numbered from 0, as the decoder's layers, whose names begin with ``language_model``.
        return "".join(match.groups())
    return None
