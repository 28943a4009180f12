"""What the loaded experts take, and what loading them takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alphaq_vllm import convert
from tests.serving.loading_memory import EXPERTS, SIZE, loading_memory, save_wide_model

MEASURE = """
import gc, json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
import torch
from vllm import LLM

def expert_bytes(model):
    held = {}
    for module in model.modules():
        if type(module).__name__ == "RoutedExperts":
            for tensor in (*module.parameters(), *module.buffers()):
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(held.values())

def largest_other_tensor(model):
    named = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    tensors = (t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.dtype == torch.int32)
    others = (t.untyped_storage() for t in tensors if t.untyped_storage().data_ptr() not in named)
    return max((storage.nbytes() for storage in others), default=0)

llm = LLM(sys.argv[1], quantization="alphaq", enforce_eager=True, max_model_len=128, max_num_seqs=2)
gc.collect()
result = [llm.apply_model(f)[0] for f in (expert_bytes, largest_other_tensor)]
print("RESULT", json.dumps(result))
"""


def test_expert_parameters_hold_the_stored_bytes(mixed_checkpoint):
    stored = largest_layer = 0
    for shard in Path(mixed_checkpoint).glob("*.safetensors"):
        with shard.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        sizes = {n: t["data_offsets"][1] - t["data_offsets"][0] for n, t in header.items() if ".experts." in n}
        stored += sum(sizes.values())
        largest_layer = max(largest_layer, sum(size for n, size in sizes.items() if n.endswith("weight_packed")))
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(mixed_checkpoint)], check=True, capture_output=True, text=True
    ).stdout
    held, other = json.loads(output.split("RESULT")[1])
    assert abs(held - stored) <= 0.01 * stored
    assert other < 0.1 * largest_layer, "packed words are kept twice"


def test_loading_takes_the_stored_bytes_and_at_most_a_layer(mixed_checkpoint, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("measures the memory of a CPU")
    widths = {name: 2 + (i // 3 + i) % 3 for i, name in enumerate(save_wide_model(tmp_path / "model"))}
    checkpoint = tmp_path / "checkpoint"
    convert(tmp_path / "model", checkpoint, bit_map=widths, quantizer="rtn")
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    layer = EXPERTS * 3 * SIZE * SIZE * (3 + 32 / 128) / 8
    peak, _ = loading_memory(mixed_checkpoint, checkpoint)
    assert 0.9 * stored <= peak <= stored + layer
