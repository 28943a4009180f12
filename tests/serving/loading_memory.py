"""What loading takes, measured in a process of its own.

python -m tests.serving.loading_memory '{"quantization": "alphaq"}' FIRST CHECKPOINT
"""

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


def loading_memory(first, checkpoint, **arguments):
    """The greatest bytes allocated while ``checkpoint`` loads, above those before, and the bytes that the model holds.

    first: a checkpoint to load before it, because the first also loads vLLM's code; arguments: vLLM's.
    """
    command = [sys.executable, "-m", "tests.serving.loading_memory", json.dumps(arguments), str(first), str(checkpoint)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return json.loads(output.split("RESULT")[1])


def main():
    # Imports vLLM, which the tests that call this need not.
    from tests.reliability.loading import load, one_rank

    arguments, first, checkpoint = json.loads(sys.argv[1]), *sys.argv[2:]
    with one_rank(tempfile.mkdtemp()):
        load(first)
        with sampled(allocated_bytes, 0.001) as samples:
            model = load(checkpoint, **arguments)
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    print("RESULT", json.dumps([max(size for _, size in samples) - samples[0][1], sum(held.values())]))


if __name__ == "__main__":
    main()
