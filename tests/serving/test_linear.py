"""Quantized linear layers in a real server."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alphaq_vllm.plugin.support import has_cpu_int4_kernel
from benchmarks.fidelity import measure
from benchmarks.server import vllm_server
from tests.serving.comparison import TWO_RANKS_ON_CPUS

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "models" / "docs-moe"


@pytest.mark.parametrize("linear_bits", ["4", "8"])
def test_server_with_quantized_linear_layers_gives_the_log_probabilities_of_the_dequantized_model(
    linear_bits, tmp_path
):
    checkpoint = tmp_path / "checkpoint"
    command = [
        sys.executable,
        "-m",
        "offline.convert",
        str(MODEL),
        str(checkpoint),
        "--bits",
        "3",
        "--group-size",
        "64",
    ]
    subprocess.run([*command, "--linear-bits", linear_bits], check=True)
    two_ranks = ["--tensor-parallel-size", "2"] if torch.cuda.device_count() != 1 else []
    environment = TWO_RANKS_ON_CPUS if two_ranks else None
    text = (ROOT / "LICENSE").read_text()
    # bfloat16 would bury small faults: on this model two programs differ by 0.03 without any quantization.
    result = measure(checkpoint, text, 2048, "float16", two_ranks, work=tmp_path, environment=environment)
    assert result.tokens > 2000
    assert result.mean_abs_difference <= 0.01
    assert result.perplexity_served == pytest.approx(result.perplexity_reference, rel=0.005)
    kernels = "linear layers on (the native CPU kernel|MarlinLinearKernel|MacheteLinearKernel)"
    assert re.search(kernels, (tmp_path / "server.log").read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CPUs")
def test_server_rounds_activations_to_8_bits_where_it_is_asked_to(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    command = [sys.executable, "-m", "offline.convert", str(MODEL), str(checkpoint), "--linear-bits", "8"]
    subprocess.run([*command, "--noise", "measured", "--quantizer", "mse"], check=True)
    environment = {"ALPHAQ_CPU_ACTIVATIONS": "int8"}
    text = (ROOT / "LICENSE").read_text()
    arguments = ["--enforce-eager"]
    result = measure(checkpoint, text, 512, "float32", arguments, work=tmp_path, kl=True, environment=environment)
    # Exact activations leave less than 1e-6.
    assert 1e-5 < result.kl < 1e-2
    assert "activations rounded to 8 bits" in (tmp_path / "server.log").read_text()


@pytest.mark.skipif(torch.cuda.is_available() or has_cpu_int4_kernel(), reason="vLLM has a kernel for this processor")
def test_server_refuses_quantized_linear_layers_that_it_cannot_compute(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    command = [sys.executable, "-m", "offline.convert", str(MODEL), str(checkpoint), "--linear-bits", "4"]
    subprocess.run([*command, "--noise", "measured", "--quantizer", "mse"], check=True)
    options = {"environment": {"ALPHAQ_CPU_KERNEL": "none"}, "log": tmp_path / "log"}
    with pytest.raises(RuntimeError), vllm_server(checkpoint, ["--quantization", "alphaq"], **options):
        pass
    assert "has no kernel for 4-bit linear layers on this processor" in (tmp_path / "log").read_text()
