"""Putting one tensor of numbers in the place of each that is stored as codes and scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from offline.source.quantized.tensor import QuantizedTensor
from offline.source.stored import LazyTensor, StoredTensor

# What scales activations or the KV cache. No weight depends on it, and a copy of the model is served without.
_ACTIVATIONS = (
    "input_scale", "input_zero_point", "input_global_scale", "input_scale_ub", "activation_scale", "output_scale",
    "k_scale", "v_scale", "q_scale", "prob_scale",
)  # fmt: skip
# What is a part of a quantized tensor and nothing else.
PARTS = (
    "_scale_inv", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_zero_point", "weight_packed",
    "weight_shape", "weight_g_idx", "_blocks", "_scales", ".qweight", ".qzeros",
)  # fmt: skip


class Parts:
    """The stored tensors of a checkpoint, by name, and those among them that belong to another."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.tensors = tensors
        self.used: set[str] = set()

    def find(self, names: Iterable[str]) -> StoredTensor | None:
        """The first that is there of some names of a part, if any."""
        for name in names:
            if name in self.tensors:
                self.used.add(name)
                return self.tensors[name]
        return None

    def take(self, name: str, codes: str) -> StoredTensor:
        """A part of the tensor whose codes have the name ``codes``. Raises ValueError if it is not there."""
        part = self.find([name])
        if part is None:
            raise ValueError(f"{codes}: expected {name} beside it, got none: download the checkpoint again")
        return part


# From the name of a stored tensor: the name and the tensor of numbers of which it has the codes, if it does.
Reader = Callable[[str, Parts], tuple[str, QuantizedTensor] | None]


def join_tensors(tensors: Mapping[str, StoredTensor], readers: Iterable[Reader]) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint with each quantized one in the place of its codes, in the same order.

    readers: for each kind of codes that there can be.
    Raises ValueError for codes without scales of the right shape and dtype, for none, and for scales without codes.
    """
    readers, parts = list(readers), Parts(tensors)
    joined: dict[str, LazyTensor] = {}
    for stored in tensors:
        found = next((found for reader in readers if (found := reader(stored, parts))), None)
        name, tensor = found or (stored, tensors[stored])
        if name != stored and name in tensors:
            raise ValueError(f"{stored}: expected it in the place of {name!r}, got both: download the checkpoint again")
        if found and 0 in tensor.spec.shape:
            raise ValueError(f"{stored}: expected codes, got none: shape {tensor.spec.shape}: download it again")
        joined[name] = tensor
    kept = {name: tensor for name, tensor in joined.items() if name not in parts.used and not _is_of_activations(name)}
    for name in kept:
        if name.endswith(PARTS) and not isinstance(kept[name], QuantizedTensor):
            raise ValueError(
                f"{name}: expected the codes of a quantized tensor that it belongs to, got none: "
                "download the checkpoint again"
            )
    return kept


def _is_of_activations(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last in _ACTIVATIONS or last.endswith(("_proj_input_scale", "_proj_activation_scale"))
