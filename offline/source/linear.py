"""Linear layers outside the experts: which of them can be quantized, how each is stored, and their values.

vLLM's own kernels serve them, so one width holds for all but the head, and layers that vLLM fuses are stored alike.
Everything else (routers, norms, embeddings, linear attention, layers for multi-token prediction) stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from alphaq_vllm.format import LINEAR_BITS, PACKED, SUPPORTED_GROUP_SIZES, LinearFormat, TensorSpec, linear_tensors
from alphaq_vllm.ranks import SHARE, fitting_ranks, shared_group_size
from offline.messages import some
from offline.source.architectures import num_layers, text_config
from offline.source.checkpoint import Checkpoint
from offline.source.families import SOURCE_DTYPES, Experts
from offline.source.recognition import family_of

# Bits of what is left alone.
UNQUANTIZED = 16
# Attention, also with latent vectors; shared experts and dense layers; Granite's shared experts; all of Nemotron's;
# DeepSeek-V4's, without `wo_a`, which vLLM multiplies by its own code.
_NAMES = (
    r"self_attn\.(?:[qkvo]_proj|q_[ab]_proj|kv_a_proj_with_mqa|kv_b_proj)"
    r"|(?:mlp|feed_forward)(?:\.shared_experts?)?\.(?:gate|up|down)_proj"
    r"|shared_mlp\.(?:input|output)_linear"
    r"|mixer\.(?:[qkvo]_proj|(?:shared_experts\.)?(?:up|down)_proj|fc[12]_latent_proj)"
    r"|attn\.(?:wq_[ab]|wkv|wo_b)|ffn\.shared_experts\.w[123]"
)
# Of the head, beside the decoder or around it.
_HEAD = "lm_head"
# What vLLM makes one layer of.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"),
          ("wq_a", "wkv"), ("w1", "w3"))  # fmt: skip
# Of which tensor parallelism divides the columns.
_ROW_PARALLEL = ("o_proj", "down_proj", "output_linear", "wo_b", "w2")


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer; ``shape`` is ``(out_features, in_features)``."""

    name: str
    shape: tuple[int, int]

    @property
    def tensor(self) -> str:
        """The source's tensor."""
        return f"{self.name}.weight"

    def specs(self, linear_format: LinearFormat) -> dict[str, TensorSpec]:
        """The tensors that store it, by name."""
        tensors = linear_tensors(*self.shape, linear_format.num_bits, linear_format.group_size)
        return {f"{self.name}.{suffix}": spec for suffix, spec in tensors.items()}


def find_linear_layers(source: Checkpoint, experts: Experts) -> list[LinearLayer]:
    """The linear layers of the decoder that can be quantized.

    Raises ValueError if there are none, and for impossible shapes and dtypes.
    """
    layers = experts.modules[0].partition("layers.")[0] + "layers."
    unnamed = family_of(source).unnamed
    others = rf"(?!{unnamed}\.)" if unnamed else ""
    pattern = re.compile(rf"({re.escape(layers)}(\d+)\.{others}(?:{_NAMES}))\.weight")
    decoder, _ = num_layers(source.config)
    matches = [match for name in source.tensors if (match := pattern.fullmatch(name)) and int(match[2]) < decoder]
    if not matches:
        raise ValueError(
            f"{source.path}: expected linear layers of attention or MLPs in {layers}*, got none: use `linear_bits=16`"
        )
    return [LinearLayer(match[1], _shape(source, match[0])) for match in matches]


def find_head(source: Checkpoint, experts: Experts) -> LinearLayer:
    """The matrix that makes predictions of the last hidden states.

    Raises ValueError if there is none that vLLM would load quantized, and for impossible shapes and dtypes.
    """
    if family_of(source).plain_head:
        raise ValueError(
            f"{source.path}: vLLM loads the head of {experts.model_type} in full precision alone: use `head_bits=16`"
        )
    parents = experts.modules[0].partition("layers.")[0].split(".")[:-1]
    around = [".".join([*parents[:count], _HEAD]) for count in range(len(parents), -1, -1)]
    found = next((name for name in around if f"{name}.weight" in source.tensors), None)
    tied = source.config.get("tie_word_embeddings", text_config(source.config).get("tie_word_embeddings")) is True
    if found is None or tied:
        # Some are stored with a copy of the embeddings, which vLLM does not load.
        raise ValueError(
            f"{source.path}: expected a head of its own, such as lm_head.weight, got none, because the model uses its "
            "embeddings, which stay as they are: use `head_bits=16`"
        )
    return LinearLayer(found, _shape(source, f"{found}.weight"))


def linear_formats(
    source: Checkpoint, experts: Experts, linear_bits: int, head_bits: int, tp_size: int = 1
) -> dict[LinearLayer, LinearFormat]:
    """The layers that are quantized and how each is stored, with 16 for widths that leave them alone.

    Their groups are the greatest that fit, whatever those of experts are, because each takes 16 bits more.
    Raises ValueError as ``find_linear_layers``, ``find_head`` and ``choose_formats`` do.
    """
    layers = find_linear_layers(source, experts) if linear_bits < UNQUANTIZED else []
    head = [find_head(source, experts)] if head_bits < UNQUANTIZED else []
    greatest = max(SUPPORTED_GROUP_SIZES)
    formats = choose_formats(layers, linear_bits, greatest, tp_size)
    return formats | choose_formats(head, head_bits, greatest, tp_size)


def check_linear_bits(field: str, bits: object) -> None:
    """Raise ValueError for a width that linear layers cannot have; field: the option that says it."""
    if bits not in (UNQUANTIZED, *LINEAR_BITS):
        raise ValueError(f"`{field}`: expected one of 16, 8, 4, got {bits!r:.80}")


def is_head(name: str) -> bool:
    """Whether a linear layer is a head.

    >>> is_head("language_model.lm_head"), is_head("model.layers.0.self_attn.q_proj")
    (True, False)
    """
    return name.rpartition(".")[2] == _HEAD


def choose_formats(
    layers: Iterable[LinearLayer], num_bits: int, group_size: int, tp_size: int = 1
) -> dict[LinearLayer, LinearFormat]:
    """Each layer at ``num_bits`` with the greatest supported group size up to ``group_size`` that divides its columns.

    tp_size: ranks of tensor parallelism, which can share columns whatever the groups.
    Raises ValueError, naming the layer, if there is none, and if layers that vLLM fuses would differ.
    """
    formats = {layer: LinearFormat(num_bits, _group_size(layer, group_size, tp_size)) for layer in layers}
    fused: dict[tuple[str, tuple[str, ...]], list[LinearLayer]] = {}
    for layer in formats:
        parent, _, name = layer.name.rpartition(".")
        for parts in _FUSED:
            if name in parts:
                fused.setdefault((parent, parts), []).append(layer)
    for together in fused.values():
        if len({(formats[layer], layer.shape[1]) for layer in together}) > 1:
            raise ValueError(
                f"{some([layer.name for layer in together])}: vLLM makes one layer of these, expected the same "
                f"in_features, got {[layer.shape[1] for layer in together]}: use `linear_bits=16`"
            )
    return formats


def stored_linear_layers(checkpoint: Checkpoint, linear: Mapping[str, LinearFormat]) -> dict[LinearLayer, LinearFormat]:
    """The layers that a finished checkpoint's config promises, with the shapes that their codes have.

    Raises ValueError, naming the tensor, for a layer without codes, or one that is stored without quantization too.
    """
    formats = {}
    for name, linear_format in linear.items():
        packed = f"{name}.{PACKED}"
        if packed not in checkpoint.tensors or len(checkpoint.spec(packed).shape) != 2:
            raise ValueError(f"{packed}: expected a matrix of packed codes, got none: convert the source again")
        if f"{name}.weight" in checkpoint.tensors:
            raise ValueError(
                f"{name}.weight: expected only the quantized layer, got this too: convert the source again"
            )
        rows, words = checkpoint.spec(packed).shape
        columns = words * 32 // linear_format.num_bits
        if columns % linear_format.group_size:
            raise ValueError(
                f"{packed}: expected whole groups of {linear_format.group_size} {linear_format.num_bits}-bit codes, "
                f"got {columns} codes in a row: convert the source again"
            )
        formats[LinearLayer(name, (rows, columns))] = linear_format
    return formats


def _shape(source: Checkpoint, name: str) -> tuple[int, int]:
    spec = source.spec(name)
    if spec.dtype not in SOURCE_DTYPES or len(spec.shape) != 2 or 0 in spec.shape:
        raise ValueError(
            f"{name}: expected a matrix in bfloat16, float16 or float32, got {spec.dtype} of shape {spec.shape}"
        )
    return spec.shape[0], spec.shape[1]


def _group_size(layer: LinearLayer, greatest: int, tp_size: int) -> int:
    in_features = layer.shape[1]
    group_size = shared_group_size(in_features, greatest)
    if group_size is None:
        raise ValueError(
            f"{layer.name}: in_features={in_features} is not divisible by any supported group size up to {greatest}: "
            "use `linear_bits=16`"
        )
    if layer.name.endswith(_ROW_PARALLEL) and in_features % (SHARE * tp_size):
        raise ValueError(
            f"{layer.name}: in_features={in_features} over `tp_size={tp_size}` ranks is {in_features / tp_size:g} "
            f"each, which is not divisible by {SHARE}: choose one of {fitting_ranks(in_features)}, or use "
            "`linear_bits=16`"
        )
    return group_size
