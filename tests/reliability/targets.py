"""What the fuzzer feeds: each target takes any bytes, and must accept them or refuse them with a sentence.

A refusal is a ValueError, or an OSError for a file that is not there, with a message. Any other exception is a bug, and
so is what is accepted but wrong, which the targets assert.
"""

import atexit
import json
import os
import shutil
import tempfile
import traceback
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch

from alphaq_vllm.format import AlphaQSpec, TensorSpec, matrix_tensors
from offline.allocation.bit_map import read_bit_map
from offline.sensitivity.stats import read_statistics
from offline.source.alphaq import check_alphaq
from offline.source.checkpoint import CONFIG, INDEX, SINGLE, open_checkpoint
from offline.source.families import find_experts
from offline.source.header import layout, read_header

MODULE = "model.layers.0.mlp.experts"
SPEC = {
    "quant_method": "alphaq",
    "format_version": 1,
    "group_size": 32,
    "num_bits": {MODULE: {"gate_proj": "3", "up_proj": "4", "down_proj": "2"}},
}
SHAPES = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
MODEL_CONFIG = {"model_type": "olmoe", "num_experts": 1, "hidden_size": 64, "num_hidden_layers": 1}

_KEPT = ExitStack()
_FOLDER = Path(tempfile.mkdtemp(prefix="alphaq-fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)


def fuzz_header(data: bytes) -> None:
    """A safetensors file."""
    path = _write("header", "x.safetensors", data)
    for stored in read_header(path).values():
        assert stored.load().shape == stored.spec.shape


def fuzz_index(data: bytes) -> None:
    """The index of a checkpoint whose two shards are whole."""
    path = _write("index", INDEX, data)
    checkpoint = open_checkpoint(str(path.parent))
    # A shard that the index does not name is no part of the model.
    assert len(checkpoint.tensors) == len(checkpoint.files) in (1, 2)
    assert {file.parent for file in checkpoint.files} == {path.parent}


def fuzz_config(data: bytes) -> None:
    """The config.json of a model that is to be converted."""
    path = _write("config", CONFIG, data)
    experts = find_experts(open_checkpoint(str(path.parent)))
    assert len(experts.matrices) == 3


def fuzz_spec(data: bytes) -> None:
    """The quantization_config of a finished checkpoint."""
    spec = AlphaQSpec.from_dict(_json(data))
    assert AlphaQSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def fuzz_alphaq(data: bytes) -> None:
    """The config.json of a finished checkpoint, against its tensors."""
    path = _write("alphaq", CONFIG, data)
    widths = check_alphaq(open_checkpoint(str(path.parent)))
    assert sorted(widths.values()) == [2, 3, 4]


def fuzz_bit_map(data: bytes) -> None:
    """A bit map made by hand."""
    read_bit_map(_write("bit_map", "map.json", data))


def fuzz_stats(data: bytes) -> None:
    """Statistics from an earlier run."""
    path = _write("stats", "stats.csv", data)
    statistics = read_statistics(path)
    path.write_text(str(statistics))
    assert read_statistics(path) == statistics


def fuzz_load(data: bytes) -> None:
    """Names, shapes and dtypes of the experts' tensors, as vLLM's loader hands them to the plugin."""
    path = _write("load", "x.safetensors", data)
    specs = {name: stored.spec for name, stored in read_header(path).items()}
    if any(not name.startswith(f"{MODULE}.") for name in specs):
        return
    model = _loading_model()
    experts = next(module for name, module in model.named_modules() if name.endswith(".experts.routed_experts"))
    try:
        model.load_weights((name, torch.ones(spec.shape, dtype=spec.dtype)) for name, spec in specs.items())
        experts.quant_method.process_weights_after_loading(experts)
    except Exception as error:
        # What an earlier tensor left must not count for the next input.
        with suppress(ValueError):
            experts.quant_method.process_weights_after_loading(experts)
        _refuse_as_vllm_would(error)
    wanted = _stored()
    assert {name: specs.get(name) for name in wanted} == wanted


def _refuse_as_vllm_would(error: Exception) -> NoReturn:
    """Raise a ValueError for what vLLM itself refuses with another error, and the error if it is the plugin's."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, ValueError) or "alphaq_vllm" in frames[-1]:
        raise error
    raise ValueError(f"vLLM: {error!r}") from error


@cache
def _loading_model() -> Any:
    """A model whose experts are to be loaded. Only this target needs vLLM."""
    from tests.reliability.loading import empty_model, one_rank

    folder = _FOLDER / "model"
    folder.mkdir(exist_ok=True)
    config = {
        **{"architectures": ["OlmoeForCausalLM"], **MODEL_CONFIG, "intermediate_size": 32, "num_experts_per_tok": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "dtype": "bfloat16"},
    }
    (folder / CONFIG).write_text(json.dumps({**config, "quantization_config": SPEC}))
    _KEPT.enter_context(one_rank(folder))
    return empty_model(folder)


def close() -> None:
    """Leave vLLM as it was found."""
    _loading_model.cache_clear()
    _KEPT.close()


TARGETS = {
    "header": fuzz_header,
    "index": fuzz_index,
    "config": fuzz_config,
    "spec": fuzz_spec,
    "alphaq": fuzz_alphaq,
    "bit_map": fuzz_bit_map,
    "stats": fuzz_stats,
    "load": fuzz_load,
}


def accepts(target: str, data: bytes) -> bool:
    """Feed a target. True if it accepts the data, False if it refuses them as it should; raises for a bug."""
    try:
        TARGETS[target](data)
    except (ValueError, OSError) as error:
        assert str(error).strip(), "a refusal without a message"
        assert not isinstance(error, UnicodeError | json.JSONDecodeError), "a refusal that names no file and no key"
        return False
    return True


def _write(target: str, name: str, data: bytes) -> Path:
    """Put the data into the target's folder, beside the whole files that go with them."""
    folder = _FOLDER / target
    if not folder.exists():
        folder.mkdir()
        for file, content in _WHOLE.get(target, dict)().items():
            (folder / file).write_bytes(content)
    path = folder / name
    with path.open("wb", buffering=0) as file:
        file.write(data)
    return path


def _json(data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON, got {error}") from None


def _shard(specs: dict) -> bytes:
    header, _ = layout(specs)
    return header + bytes(sum(spec.nbytes for spec in specs.values()))


def _plain() -> dict:
    return {f"{MODULE}.0.{name}.weight": TensorSpec(shape, torch.bfloat16) for name, shape in SHAPES.items()}


def _stored() -> dict:
    bits = SPEC["num_bits"][MODULE]
    return {
        f"{MODULE}.0.{name}.{suffix}": spec
        for name, shape in SHAPES.items()
        for suffix, spec in matrix_tensors(*shape, int(bits[name]), SPEC["group_size"]).items()
    }


def _two_shards() -> dict[str, bytes]:
    first, second, _ = _plain().items()
    shards = {"model-00001-of-00002.safetensors": dict([first]), "model-00002-of-00002.safetensors": dict([second])}
    return {CONFIG: b"{}", **{name: _shard(specs) for name, specs in shards.items()}}


_WHOLE = {
    "index": _two_shards,
    "config": lambda: {SINGLE: _shard(_plain())},
    "alphaq": lambda: {SINGLE: _shard(_stored())},
}
