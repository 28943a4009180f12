"""AWQ and GPTQ checkpoints of a Mixture-of-Experts model, made by llm-compressor, to compare with.

    python -m benchmarks.peer_checkpoint MODEL OUT --method awq --calibration FILE [--samples 256] [--context 512]

Runs in an environment of its own with llmcompressor 0.14.0.1, which does not go together with vLLM's: `make
.venv-peers/.installed`. The command and its versions are kept in OUT/made_by.json. The settings are
those of llm-compressor's examples for Mixture-of-Experts models: 4 bits in groups of 128, every expert calibrated on
every token. What is quantized is what this project quantizes, the routed experts, so that sizes compare.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

EXPERTS = r"re:.*\.experts\.\d+\..*"
RECIPES = {
    "awq": lambda: [AWQModifier(duo_scaling="both"), QuantizationModifier(targets=[EXPERTS], scheme="W4A16_ASYM")],
    "gptq": lambda: [GPTQModifier(targets=[EXPERTS], scheme="W4A16")],
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=RECIPES, required=True)
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--samples", type=int, default=256, help="windows of the text, spread evenly (default 256)")
    parser.add_argument("--context", type=int, default=512, help="tokens in a window (default 512)")
    args = parser.parse_args()
    if not torch.accelerator.is_available():
        # It asks for pinned memory everywhere, and torch has none without an accelerator to pin it for.
        IntermediatesCache.pin_memory = lambda *arguments, **keywords: None
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    linearize_moe(model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.tensor(tokenizer(args.calibration.read_text(), add_special_tokens=False, verbose=False)["input_ids"])
    every = ids.unfold(0, args.context, args.context)
    rows = every[torch.linspace(0, len(every) - 1, min(args.samples, len(every))).round().long()].tolist()
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * args.context for _ in rows]}),
        recipe=RECIPES[args.method](),
        max_seq_length=args.context,
        num_calibration_samples=len(rows),
        output_dir=str(args.out),
    )
    tokenizer.save_pretrained(args.out)
    command = shlex.join(["python", "-m", "benchmarks.peer_checkpoint", *sys.argv[1:]])
    packages = ("llmcompressor", "compressed-tensors", "torch", "transformers")
    made_by = {"command": command, "windows": len(rows), **{name: version(name) for name in packages}}
    (args.out / "made_by.json").write_text(json.dumps(made_by, indent=2))


if __name__ == "__main__":
    main()
