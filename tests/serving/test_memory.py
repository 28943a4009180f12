"""What loaded experts take, and what loading them takes: quantized already, and quantized by vLLM."""

import json

import pytest
import torch
from safetensors import safe_open

from tests.conftest import run_alphaq
from tests.serving.loading_memory import EXPERTS, LAYERS, SIZE, loading_memory, save_wide_model

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="measures the memory of a CPU")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint with large layers, whose source lies beside it."""
    folder = tmp_path_factory.mktemp("wide")
    widths = {name: 2 + (i // 3 + i) % 3 for i, name in enumerate(save_wide_model(folder / "source"))}
    (folder / "bit_map.json").write_text(json.dumps(widths))
    checkpoint = folder / "checkpoint"
    run_alphaq("convert", folder / "source", checkpoint, "--bit-map", folder / "bit_map.json", "--quantizer", "rtn")
    return checkpoint


@pytest.fixture(scope="module")
def measured(mixed_checkpoint, checkpoint):
    """What loading the checkpoint takes, and what loading its source, which vLLM quantizes."""
    settings = {"quant_method": "alphaq", "bit_map": str(checkpoint.with_name("bit_map.json")), "quantizer": "rtn"}
    online = {"skip_tokenizer_init": True, "hf_overrides": {"quantization_config": settings}}
    models = [(str(checkpoint), {"skip_tokenizer_init": True}), (str(checkpoint.with_name("source")), online)]
    return loading_memory(mixed_checkpoint, models)


def test_experts_hold_the_stored_bytes(measured, checkpoint):
    stored = 0
    for shard in checkpoint.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            stored += sum(file.get_tensor(name).nbytes for name in file.keys() if ".experts." in name)  # noqa: SIM118
    for _, _, experts, other in measured:
        assert abs(experts - stored) <= 0.01 * stored
        assert other < 0.1 * stored / LAYERS, "packed words are kept twice"


@on_cpu
def test_loading_takes_the_stored_bytes_and_at_most_a_layer(measured, checkpoint):
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    layer = EXPERTS * 3 * SIZE * SIZE * (3 + 32 / 128) / 8
    peak, *_ = measured[0]
    assert 0.9 * stored <= peak <= stored + layer


@on_cpu
def test_quantizing_while_loading_takes_the_quantized_bytes_and_less_than_a_layer(measured):
    layer = 2 * EXPERTS * 3 * SIZE * SIZE
    peak, held, *_ = measured[1]
    assert held < 1.5 * layer
    assert 0.9 * held <= peak <= held + layer
