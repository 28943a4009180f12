"""Does vLLM serve exactly what the checkpoint says?

    python -m benchmarks.fidelity CHECKPOINT --text FILE [--tokens 8192] [--dtype float32] [--serve-args=ARGUMENTS]

Dequantizes an AlphaQ checkpoint, runs the result in transformers, serves the checkpoint with ``vllm serve``, and
compares the log-probabilities of the text's tokens. ``--unquantized`` compares an ordinary checkpoint with itself:
how much the two programs differ without any quantization.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.server import vllm_server


@dataclass
class Fidelity:
    """Log-probabilities (natural) from a server against those of the reference."""

    tokens: int
    mean_abs_difference: float
    max_abs_difference: float
    perplexity_served: float
    perplexity_reference: float


def windows(model: Path, text: str, tokens: int, length: int = 512) -> list[list[int]]:
    """The first ``tokens`` tokens of the text, in windows of at most ``length``."""
    ids = AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"][:tokens]
    return [ids[i : i + length] for i in range(0, len(ids), length) if len(ids[i : i + length]) > 1]


@torch.inference_mode()
def reference_logprobs(model: Path, prompts: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    """Log-probability of every token of every prompt but its first, by transformers."""
    net = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    picked = []
    for ids in prompts:
        tokens = torch.tensor(ids)
        logprobs = net(tokens[None]).logits[0, :-1].float().log_softmax(-1)
        picked.append(logprobs.gather(1, tokens[1:, None])[:, 0])
    return torch.cat(picked)


def served_logprobs(base_url: str, prompts: list[list[int]], model: str | None = None) -> torch.Tensor:
    """The same, by an OpenAI-compatible server; model: one of its names, such as an adapter's."""
    picked: list[float] = []
    for ids in prompts:
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        body |= {"model": model} if model else {}
        request = urllib.request.Request(
            f"{base_url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            entries = json.load(response)["choices"][0]["prompt_logprobs"]
        picked += [entry[str(token)]["logprob"] for entry, token in zip(entries[1:], ids[1:], strict=True)]
    return torch.tensor(picked)


def compare(served: torch.Tensor, reference: torch.Tensor) -> Fidelity:
    """Summarize two vectors of log-probabilities of the same tokens."""
    difference = (served - reference).abs()
    return Fidelity(
        tokens=len(served),
        mean_abs_difference=difference.mean().item(),
        max_abs_difference=difference.max().item(),
        perplexity_served=math.exp(-served.mean().item()),
        perplexity_reference=math.exp(-reference.mean().item()),
    )


def measure(
    checkpoint: Path,
    text: str,
    tokens: int,
    dtype: str,
    serve_args: list[str],
    *,
    work: Path,
    quantized: bool = True,
    environment: dict[str, str] | None = None,
) -> Fidelity:
    """Serve ``checkpoint`` and compare it with transformers; ``work`` takes the log and the dequantized model."""
    reference = checkpoint
    if quantized:
        reference = work / "dequantized"
        if not reference.exists():
            command = [sys.executable, "-m", "offline.dequantize", str(checkpoint), str(reference), "--dtype", dtype]
            subprocess.run(command, check=True)
        serve_args = ["--quantization", "alphaq", *serve_args]
    prompts = windows(reference, text, tokens)
    expected = reference_logprobs(reference, prompts, getattr(torch, dtype))
    arguments = ["--dtype", dtype, "--max-model-len", "1024", "--no-enable-prefix-caching", *serve_args]
    with vllm_server(checkpoint, arguments, log=work / "server.log", environment=environment) as base_url:
        served = served_logprobs(base_url, prompts)
    return compare(served, expected)


def main() -> None:
    """Print the comparison as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--unquantized", action="store_true", help="the checkpoint is an ordinary one")
    parser.add_argument("--serve-args", type=shlex.split, default=[], help="more arguments for vllm serve, one string")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="alphaq-fidelity-") as folder:
        result = measure(
            args.checkpoint,
            args.text.read_text(),
            args.tokens,
            args.dtype,
            args.serve_args,
            work=Path(folder),
            quantized=not args.unquantized,
        )
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
