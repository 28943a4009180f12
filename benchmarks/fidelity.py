"""Does vLLM serve exactly what the checkpoint says?

    python -m benchmarks.fidelity CHECKPOINT --text FILE [--tokens N] [--dtype float32] [--serve-args=ARGUMENTS] [--kl]

Dequantizes an AlphaQ checkpoint, runs the result in transformers, serves the checkpoint with ``vllm serve``, and
compares the log-probabilities of the text's tokens, with ``--kl`` of all tokens of a small vocabulary.
``--unquantized`` compares an ordinary checkpoint with itself: how much the two programs differ without any
quantization.
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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.server import vllm_server


@dataclass
class Fidelity:
    """Log-probabilities (natural) from a server against those of the reference; kl: the divergence of the reference's
    distribution from the server's, if asked for.
    """

    tokens: int
    mean_abs_difference: float
    max_abs_difference: float
    perplexity_served: float
    perplexity_reference: float
    kl: float | None = None


def windows(model: Path, text: str, tokens: int, length: int = 512) -> list[list[int]]:
    """The first ``tokens`` tokens of the text, in windows of at most ``length``."""
    ids = AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"][:tokens]
    return [ids[i : i + length] for i in range(0, len(ids), length) if len(ids[i : i + length]) > 1]


@torch.inference_mode()
def _distributions(model: Path, prompts: list[list[int]], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Of every prompt the log-probabilities after every token but the last, ``[tokens - 1, vocabulary]``."""
    net = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    for ids in prompts:
        yield net(torch.tensor(ids)[None]).logits[0, :-1].float().log_softmax(-1)


def reference_logprobs(model: Path, prompts: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    """Log-probability of every token of every prompt but its first, by transformers."""
    every = zip(_distributions(model, prompts, dtype), prompts, strict=True)
    return torch.cat([logprobs.gather(1, torch.tensor(ids)[1:, None])[:, 0] for logprobs, ids in every])


def served_logprobs(base_url: str, prompts: list[list[int]], model: str | None = None) -> torch.Tensor:
    """The same, by an OpenAI-compatible server; model: one of its names, such as an adapter's."""
    picked: list[float] = []
    for ids in prompts:
        entries = _prompt_logprobs(base_url, ids, 0, model)
        picked += [entry[str(token)]["logprob"] for entry, token in zip(entries, ids[1:], strict=True)]
    return torch.tensor(picked)


def served_kl(base_url: str, prompts: list[list[int]], model: Path, dtype: torch.dtype) -> float:
    """Mean KL divergence, in nats, of transformers' distributions from those of a server with ``--max-logprobs -1``."""
    divergences = []
    for ids, wanted in zip(prompts, _distributions(model, prompts, dtype), strict=True):
        served = torch.full_like(wanted, torch.nan)
        for row, entry in zip(served, _prompt_logprobs(base_url, ids, -1), strict=True):
            row[[int(token) for token in entry]] = torch.tensor([of["logprob"] for of in entry.values()])
        divergences.append((wanted.double().exp() * (wanted.double() - served.double())).sum(-1))
    return float(torch.cat(divergences).mean())


def _prompt_logprobs(base_url: str, ids: list[int], number: int, model: str | None = None) -> list[dict[str, dict]]:
    """What a server says of every token of a prompt but the first: of itself and of the ``number`` most likely, or of
    all if that is -1.
    """
    body = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": number}
    body |= {"model": model} if model else {}
    request = urllib.request.Request(
        f"{base_url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)["choices"][0]["prompt_logprobs"][1:]


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
    kl: bool = False,
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
    arguments += ["--max-logprobs", "-1"] if kl else []
    with vllm_server(checkpoint, arguments, log=work / "server.log", environment=environment) as base_url:
        found = compare(served_logprobs(base_url, prompts), expected)
        return replace(found, kl=served_kl(base_url, prompts, reference, getattr(torch, dtype))) if kl else found


def main() -> None:
    """Print the comparison as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--kl", action="store_true", help="the KL divergence too")
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
            kl=args.kl,
        )
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
