"""Telling one source from another without reading it all."""

from __future__ import annotations

import hashlib
import json

from offline.source.checkpoint import Checkpoint
from offline.source.header import read_header

_SAMPLE_BYTES = 4096


def fingerprint(source: Checkpoint) -> str:
    """A digest of the config, the name, place, shape and dtype of every tensor, and up to 4 KiB of its data."""
    digest = hashlib.sha256(json.dumps(source.config, sort_keys=True).encode())
    for path in source.files:
        with path.open("rb", buffering=0) as file:
            for name, stored in read_header(path).items():
                digest.update(f"{name} {stored.spec} {path.name} {stored.offset}\n".encode())
                length = min(_SAMPLE_BYTES, stored.spec.nbytes)
                file.seek(stored.offset + (stored.spec.nbytes - length) // 2)
                digest.update(file.read(length))
    return digest.hexdigest()
