"""The whole way in one command: convert a model, serve the result with vLLM, ask it over HTTP, show the answer.

    python -m benchmarks.demo MODEL --bits 3.5 [--prompt TEXT] [--serve-args=ARGUMENTS]

Exits with a status other than 0 if any step fails or the answer is empty.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from benchmarks.server import vllm_server


def complete(base_url: str, prompt: str, max_tokens: int = 60) -> str:
    """One greedy completion from an OpenAI-compatible server."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0}
    request = urllib.request.Request(
        f"{base_url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]["text"]


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a local directory or a hub name")
    parser.add_argument("--bits", default="3.5", help="average bits per expert weight (default: %(default)s)")
    parser.add_argument("--prompt", default="Return a list of")
    parser.add_argument("--serve-args", type=shlex.split, default=[], help="more arguments for vllm serve, one string")
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="alphaq-demo-") as folder:
        checkpoint, log = Path(folder, "checkpoint"), Path(folder, "server.log")
        convert = [sys.executable, "-m", "offline.convert", args.model, str(checkpoint), "--bits", args.bits]
        status = subprocess.run(convert, check=False).returncode
        if status:
            sys.exit(status)
        print(f"\nvllm serve {checkpoint} --quantization alphaq {' '.join(args.serve_args)}", flush=True)
        try:
            with vllm_server(checkpoint, ["--quantization", "alphaq", *args.serve_args], log=log) as base_url:
                answer = complete(base_url, args.prompt)
        except (RuntimeError, OSError) as error:
            sys.exit(f"error: {error}")
    if not answer.strip():
        sys.exit("error: expected a completion, got an empty answer")
    print(f"\nprompt:     {args.prompt}\ncompletion:{answer}\n\nConverted, served and answered in", end=" ")
    print(f"{time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    main()
