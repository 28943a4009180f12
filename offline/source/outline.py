"""The outline of a checkpoint on the Hugging Face Hub: a directory that has its config and headers, and no weights.

Of a file of weights the first bytes are asked for, up to the end of its header. The rest of the file here is a hole,
which takes no room on disk. So everything that reads no tensor works on the directory as on the checkpoint itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from offline.messages import reason
from offline.source.checkpoint import CONFIG, INDEX, SINGLE
from offline.source.header import MAX_HEADER_BYTES

# What says how weights are stored.
_TEXTS = (CONFIG, INDEX, "hf_quant_config.json")
# What holds weights, some of which nothing here can read: that they are there is part of what is said then.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# Most headers are shorter.
_FIRST_BYTES = 2**17
_LENGTH_BYTES = 8
_REQUESTS, _TIMEOUT = 8, 30


@dataclass(frozen=True)
class Outline:
    """A directory with the outline of the model ``name``; ``commit``: of which state."""

    name: str
    commit: str
    directory: Path


@contextmanager
def outline(name: str, revision: str | None = None) -> Iterator[Outline]:
    """The outline of a model on the Hub, as long as the block runs.

    name: ``owner/model``; revision: the branch, tag or commit there, by default the main branch.
    Raises OSError if the Hub does not deliver it.
    """
    with TemporaryDirectory(prefix="alphaq-plan-") as folder:
        directory = Path(folder) / name
        directory.mkdir(parents=True)
        yield Outline(name, _fetch(name, revision, directory), directory)


def _fetch(name: str, revision: str | None, directory: Path) -> str:
    # What the Hub's client is made of, and whose errors it lets through.
    from httpx import HTTPError
    from huggingface_hub import HfApi, hf_hub_download

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        commit = str(info.sha)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or () if "/" not in file.rfilename}
        for text in _TEXTS:
            if text in sizes:
                content = Path(hf_hub_download(name, text, revision=commit)).read_bytes()
                (directory / text).write_bytes(content)
        shards = _shards(directory / INDEX, sizes)
        for file in sizes:
            if file.endswith(_WEIGHTS) and file not in shards:
                (directory / file).touch()
        with ThreadPoolExecutor(_REQUESTS) as pool:
            list(pool.map(partial(_fetch_header, name, commit, directory), shards, map(sizes.__getitem__, shards)))
        return commit
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        raise OSError(
            f"{name}: no such directory, and the Hugging Face Hub did not deliver it"
            f"{f' at {revision}' if revision else ''}: {reason(error)}"
        ) from error


def _shards(index: Path, sizes: Mapping[str, int]) -> list[str]:
    """The files whose headers are wanted; what is wrong with an index is said where checkpoints are opened."""
    names = {SINGLE}
    if index.exists():
        try:
            names = {str(file) for file in json.loads(index.read_bytes())["weight_map"].values()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return []
    return sorted(names & sizes.keys())


def _fetch_header(name: str, commit: str, directory: Path, file: str, size: int) -> None:
    first = _fetch_start(name, commit, file, min(size, _FIRST_BYTES))
    header = _LENGTH_BYTES + int.from_bytes(first[:_LENGTH_BYTES], "little")
    if len(first) < header <= min(size, MAX_HEADER_BYTES):
        first = _fetch_start(name, commit, file, header)
    with (directory / file).open("wb") as local:
        local.write(first[:header])
        local.truncate(size)


def _fetch_start(name: str, commit: str, file: str, length: int) -> bytes:
    """The first bytes of a file, and hardly any more where a server does not know ranges."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    if not length:
        return b""
    headers = {**build_hf_headers(), "Range": f"bytes=0-{length - 1}", "Accept-Encoding": "identity"}
    content = bytearray()
    url = hf_hub_url(name, file, revision=commit)
    with http_stream_backoff("GET", url, headers=headers, timeout=_TIMEOUT) as response:
        hf_raise_for_status(response)
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) >= length:
                break
    if len(content) < length:
        raise OSError(f"{file}: expected {length} bytes, got {len(content)}: try again")
    return bytes(content[:length])
