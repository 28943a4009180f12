"""A real ``vllm serve`` process on loopback, for as long as a ``with`` block lasts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

# vLLM's CPU build otherwise reserves 4 GiB or more for the KV cache, and binds threads on its own terms.
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}


@contextmanager
def vllm_server(
    checkpoint: Path | str,
    arguments: Sequence[str] = (),
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
    timeout: float = 600.0,
) -> Iterator[str]:
    """Run ``vllm serve checkpoint *arguments`` and yield its base URL (``http://...:PORT/v1``) once it is healthy.

    Everything that the server prints goes to the file ``log``. The process and its workers are gone at the end of the
    block. Raises RuntimeError, with the end of the log, if the server ends or is not healthy after ``timeout`` seconds.
    """
    port = _free_port()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(checkpoint)]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    env = {**os.environ, **({} if torch.cuda.is_available() else CPU_ENVIRONMENT), **(environment or {})}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)
    try:
        _wait_until_healthy(process, port, log, timeout)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(process: subprocess.Popen, port: int, log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vllm serve ended with status {process.returncode}; the end of {log}:\n{_tail(log)}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise RuntimeError(f"vllm serve was not healthy after {timeout:g} s; the end of {log}:\n{_tail(log)}")


def _tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _stop(process: subprocess.Popen) -> None:
    """End the whole process group: workers outlive a killed parent."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
    except ProcessLookupError:
        return
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
