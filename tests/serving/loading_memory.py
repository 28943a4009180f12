"""What loading takes, measured in a process of its own.

python -m tests.serving.loading_memory FIRST '[["CHECKPOINT", {"max_model_len": 64}]]'
"""

import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from benchmarks.memory import allocated_bytes, sampled
from tests.conftest import MODEL

ROOT = Path(__file__).parents[2]
LAYERS, EXPERTS, SIZE = 4, 16, 1024


def save_wide_model(folder):
    """A bfloat16 model whose layers of experts are large beside all else; returns the names of its matrices."""
    config = transformers.AutoConfig.from_pretrained(
        MODEL,
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        hidden_size=SIZE,
        moe_intermediate_size=SIZE,
        layer_types=["full_attention"] * LAYERS,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return [
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
        for projection in ("gate", "up", "down")
    ]


def loading_memory(first, models):
    """What loading each of some models takes, one after the other in one process.

    first: a checkpoint to load before them, because the first also loads vLLM's code; models: folders, each with
    arguments for vLLM. Returns for each the greatest bytes allocated while it loads, above those before; the bytes that
    the model holds; those of its experts; and those of the largest new tensor of integers that is not in the model.
    """
    command = [sys.executable, "-m", "tests.serving.loading_memory", str(first), json.dumps(models)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return json.loads(output.split("RESULT")[1])


def measure(checkpoint, arguments):
    before = storages(integers())
    with sampled(allocated_bytes, 0.001) as samples:
        model = load(checkpoint, **arguments)
    peak = max(size for _, size in samples) - samples[0][1]
    experts = [module for module in model.modules() if type(module).__name__ == "RoutedExperts"]
    held = storages(tensors_of(model))
    of_experts = storages(tensor for module in experts for tensor in tensors_of(module))
    others = [size for place, size in storages(integers()).items() if place not in held.keys() | before.keys()]
    return [peak, sum(held.values()), sum(of_experts.values()), max(others, default=0)]


def integers():
    """Tensors like those that hold packed words."""
    gc.collect()
    return [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.dtype == torch.int32]


def tensors_of(module):
    return [*module.parameters(), *module.buffers()]


def storages(tensors):
    """The bytes of each piece of memory, by its place."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def main():
    first, models = sys.argv[1], json.loads(sys.argv[2])
    with one_rank(tempfile.mkdtemp()):
        load(first)
        print("RESULT", json.dumps([measure(*model) for model in models]))


if __name__ == "__main__":
    # Imports vLLM, which the tests that start this need not.
    from tests.reliability.loading import load, one_rank

    main()
