"""What a conversion will take of each GPU that serves it, from shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from alphaq_vllm.format import SCALE_DTYPE, SHARD_IDS, SUPPORTED_GROUP_SIZES, LinearFormat, stored_bits_per_weight
from alphaq_vllm.ranks import SHARE, fitting_ranks, shared_group_size
from offline.operations.plan import Job
from offline.progress import parse_bytes
from offline.source.architectures import text_config
from offline.source.linear import LinearLayer
from offline.source.recognition import draft_tensors

Parallel = Literal["tensor", "expert"]
# Of a GPU's memory, what vLLM leaves to other programs.
LEFT_ALONE = Fraction(1, 10)
# What vLLM divides among ranks; of everything else each has all.
_DIVIDED = re.compile(
    r"(.*\.)?(embed_tokens|lm_head|[qkvo]_proj|qkv_proj|q_b_proj|kv_b_proj|gate_proj|up_proj|down_proj|gate_up_proj"
    r"|input_linear|output_linear|in_proj_\w+|out_proj)\.(weight|bias)"
)
_KEYS_VALUES = ("k_proj", "v_proj")
# A number of activations, and of keys and values, takes 16 bits.
_ITEMSIZE = 2


@dataclass(frozen=True)
class Gpus:
    """GPUs of one kind, each with ``memory`` bytes."""

    number: int
    memory: int

    @property
    def usable(self) -> int:
        """Bytes of each that vLLM takes."""
        return math.floor(self.memory * (1 - LEFT_ALONE))


def parse_gpus(text: str) -> Gpus:
    """Read a number of GPUs and the memory of each.

    >>> parse_gpus("2x24GiB"), parse_gpus("80GB")
    (Gpus(number=2, memory=25769803776), Gpus(number=1, memory=80000000000))
    """
    match = re.fullmatch(r"(?:(\d{1,4})\s*x\s*)?(.+)", text.strip(), re.IGNORECASE)
    try:
        if match and int(match[1] or 1) > 0:
            return Gpus(int(match[1] or 1), parse_bytes(match[2]))
    except ValueError:
        pass
    raise ValueError(f"`gpus`: expected a number of GPUs and the memory of each, such as 2x24GiB, got {text!r:.80}")


@dataclass(frozen=True)
class Divided:
    """The weights of a model on one of several ranks.

    parallel: how experts are divided, each of them (``tensor``) or among ranks (``expert``); weights: bytes on the rank
    that has most; group_size: of the columns of down that this rank sees.
    """

    parallel: Parallel
    weights: int
    group_size: int


def divide(job: Job, bits: float, ranks: int, parallel: Parallel) -> Divided:
    """The weights on one of ``ranks`` ranks, with experts of ``bits`` on average, those of each rank too.

    Layers for multi-token prediction are left out, which vLLM loads only to draft.
    Raises ValueError if vLLM cannot divide the model so.
    """
    _check_heads(job.source.config, ranks)
    experts, group_size = _expert_bytes(job, bits, ranks, parallel)
    linear = {layer.tensor: layer for layer in job.linear}
    left_out = {matrix.tensor for matrix in job.experts.matrices} | draft_tensors(job.source)
    others = Fraction(0)
    for name in job.source.tensors:
        if name not in left_out:
            layer = linear.get(name)
            nbytes = _linear_bytes(layer, job.linear[layer]) if layer else _plain(job, name)
            others += nbytes * _share(job.source.config, name, ranks)
    return Divided(parallel, math.ceil(experts + others), group_size)


def cache_bytes_per_token(config: Mapping[str, Any], ranks: int) -> int | None:
    """Bytes of keys and values that one of ``ranks`` ranks keeps of a token; None if the config does not say it.

    As much as if every layer saw all tokens: those with a window or with linear attention keep less.
    """
    config = text_config(config)
    layers, latent, rope = (_number(config, key) for key in ("num_hidden_layers", "kv_lora_rank", "qk_rope_head_dim"))
    if layers and latent:
        # Latent vectors are on each rank.
        return layers * (latent + (rope or 0)) * _ITEMSIZE
    heads, hidden_size = _number(config, "num_attention_heads"), _number(config, "hidden_size")
    if not (layers and heads and hidden_size):
        return None
    kept = math.ceil((_number(config, "num_key_value_heads") or heads) / ranks)
    return layers * 2 * kept * (_number(config, "head_dim") or hidden_size // heads) * _ITEMSIZE


def _check_heads(config: Mapping[str, Any], ranks: int) -> None:
    heads = _number(text_config(config), "num_attention_heads")
    if heads and heads % ranks:
        raise ValueError(f"{heads} heads of attention cannot be shared by {ranks} ranks")


def _expert_bytes(job: Job, bits: float, ranks: int, parallel: Parallel) -> tuple[Fraction, int]:
    """Bytes of the experts on the rank with most, and the size of the groups of down there."""
    total, seen = Fraction(0), job.group_size
    for matrix in job.experts.matrices:
        group_size = job.group_size
        if SHARD_IDS[matrix.projection] == "w2" and parallel == "tensor":
            columns = matrix.shape[1]
            if columns % (SHARE * ranks):
                raise ValueError(
                    f"experts {columns} wide cannot be shared by {ranks} ranks, of which each needs a multiple of "
                    f"{SHARE}: {', '.join(map(str, fitting_ranks(columns)))} can"
                )
            group_size = seen = shared_group_size(columns // ranks, job.group_size) or min(SUPPORTED_GROUP_SIZES)
        total += Fraction(matrix.numel) * Fraction(stored_bits_per_weight(bits, group_size)) / 8
        # Ranks that share columns have the scales of all rows.
        copies = ranks if SHARD_IDS[matrix.projection] == "w2" and parallel == "tensor" else 1
        total += SCALE_DTYPE.itemsize * matrix.shape[0] * copies
    number = job.experts.num_experts
    return total * (Fraction(1, ranks) if parallel == "tensor" else Fraction(math.ceil(number / ranks), number)), seen


def _share(config: Mapping[str, Any], name: str, ranks: int) -> Fraction:
    """How much of a tensor each rank has."""
    match = _DIVIDED.fullmatch(name)
    if match is None:
        return Fraction(1)
    heads = _number(text_config(config), "num_key_value_heads")
    if match[2] in _KEYS_VALUES and heads:
        # Ranks beyond the number of heads have copies.
        return Fraction(math.ceil(heads / ranks), heads)
    return Fraction(1, ranks)


def _linear_bytes(layer: LinearLayer, linear_format: LinearFormat) -> int:
    return sum(spec.nbytes for spec in layer.specs(linear_format).values())


def _plain(job: Job, name: str) -> int:
    """Bytes of a tensor in 16 bits, unless it takes fewer."""
    spec = job.source.spec(name)
    return math.prod(spec.shape) * min(spec.dtype.itemsize, _ITEMSIZE)


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int and value > 0 else None
