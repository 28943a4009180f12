"""Checkpoints with the layers of real models in their true size, through every step."""

import subprocess
import sys

import pytest

from benchmarks.generate import MODELS, generate

LOAD = """
import os, sys
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    llm = LLM(sys.argv[1], quantization="alphaq", enforce_eager=True, max_model_len=128, max_num_seqs=2)
    output = llm.generate({"prompt_token_ids": [5, 6, 7, 8]}, SamplingParams(max_tokens=4, temperature=0.0))
    assert len(output[0].outputs[0].token_ids) > 0
"""


def offline(command, *arguments):
    subprocess.run([sys.executable, "-m", f"offline.{command}", *map(str, arguments)], check=True)


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_true_shapes_convert_validate_dequantize_and_load(name, tmp_path):
    model, checkpoint, dequantized = tmp_path / "model", tmp_path / "checkpoint", tmp_path / "dequantized"
    generate(name, model, layers=2 if name == "deepseek-v2-lite" else 1)
    # By the weights alone: running a model of this size takes hours on a few cores, and random weights write no text.
    offline("convert", model, checkpoint, "--bits", "3.5", "--noise", "measured", "--quantizer", "mse")
    offline("validate", checkpoint, "--source", model)
    offline("dequantize", checkpoint, dequantized)
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    subprocess.run([sys.executable, str(script), str(checkpoint)], check=True)
