"""What the loaded experts take, and what loading them takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from offline.convert import convert
from tests.conftest import MODEL

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


PEAK = """
import json, sys, tempfile, threading
from pathlib import Path
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from tests.reliability.loading import load, one_rank

def allocated():
    # Files that are mapped into memory do not count: they can be dropped at any moment.
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def watched(self, *args, **kwargs):
    before, peak, done = allocated(), [0], threading.Event()
    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], allocated())
    thread = threading.Thread(target=watch)
    thread.start()
    model = load_model(self, *args, **kwargs)
    done.set()
    thread.join()
    print("RESULT", json.dumps(peak[0] - before))
    return model

load_model, DefaultModelLoader.load_model = DefaultModelLoader.load_model, watched
with one_rank(tempfile.mkdtemp()):
    # The first one also loads vLLM's code.
    for checkpoint in sys.argv[1:]:
        load(checkpoint, dtype="bfloat16")
"""


def test_loading_takes_the_stored_bytes_and_at_most_a_layer(mixed_checkpoint, tmp_path, pytestconfig):
    if torch.cuda.is_available():
        pytest.skip("measures the memory of a CPU")
    layers, experts, size = 4, 16, 1024
    config = transformers.AutoConfig.from_pretrained(
        MODEL,
        num_hidden_layers=layers,
        num_experts=experts,
        hidden_size=size,
        moe_intermediate_size=size,
        layer_types=["full_attention"] * layers,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    widths = {
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj": 2 + (expert + i) % 3
        for layer in range(layers)
        for expert in range(experts)
        for i, projection in enumerate(("gate", "up", "down"))
    }
    checkpoint = tmp_path / "checkpoint"
    convert(str(tmp_path / "model"), checkpoint, widths, quantizer="rtn")
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    layer = experts * 3 * size * size * (3 + 32 / 128) / 8
    command = [sys.executable, "-c", PEAK, str(mixed_checkpoint), str(checkpoint)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=pytestconfig.rootpath).stdout
    peak = json.loads(output.split("RESULT")[-1].splitlines()[0])
    assert 0.9 * stored <= peak <= stored + layer, (peak, stored, layer)
