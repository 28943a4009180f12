"""Uploading a finished checkpoint to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alphaq_vllm.checksums import EDITABLE, SUMS, compare_sums, format_sums, refuse
from alphaq_vllm.format import AlphaQSpec
from offline.messages import printed, reason
from offline.source.checkpoint import open_checkpoint
from offline.source.hub import NAME


def upload(checkpoint: str | Path, repo: str, *, private: bool = False) -> dict[str, Any]:
    """Upload a checkpoint, in one commit, after comparing all its files with their sums.

    Args:
        checkpoint: The directory of an AlphaQ checkpoint.
        repo: A repository on the Hugging Face Hub, ``owner/name``, which is made if it does not exist.
        private: Refuse a repository that others can read.

    Returns:
        ``repo``, ``url`` of the commit, ``files`` and their ``size`` in bytes, and ``left``, the files without a sum,
        which are not uploaded.

    Raises:
        ValueError: For a name that the Hub does not take, and for a checkpoint that is not as its sums say.
        OSError: For files that cannot be read, and for what the Hub refuses. Run again, it sends what is missing.
    """
    directory = Path(checkpoint)
    _check_name(repo)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: expected the directory of an AlphaQ checkpoint, got none")
    config = open_checkpoint(str(directory)).config
    if config.get("quantization_config") is None:
        raise ValueError(f"{directory}: expected an AlphaQ checkpoint, got one that is not quantized: convert it first")
    AlphaQSpec.from_dict(config["quantization_config"])
    comparison = compare_sums(directory)
    refuse(directory, comparison.without(EDITABLE))
    # With the sums of what was edited, so that whoever downloads it can check all.
    sums = format_sums(comparison.found).encode()
    return {
        "repo": repo,
        "url": _commit(directory, repo, private, [*comparison.found], sums),
        "files": len(comparison.found) + 1,
        "size": sum((directory / name).stat().st_size for name in comparison.found) + len(sums),
        "left": _without_sum(directory, {SUMS, *comparison.found}),
    }


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        valid = NAME.fullmatch(repo) is not None
    except HFValidationError:
        valid = False
    if not valid:
        raise ValueError(
            "repo: expected owner/name of at most 96 letters, digits, '-', '_' and '.', as the Hugging Face Hub takes "
            f"it, got {repo!r:.80}"
        )


def _commit(directory: Path, repo: str, private: bool, names: list[str], sums: bytes) -> str:
    """Send the files and return the address of the commit."""
    # What the Hub's client is made of, and whose errors it lets through.
    from httpx import HTTPError
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        readable = private and not api.model_info(repo).private
        if not readable:
            # By its path each, for the client takes names of many files as patterns.
            files = [CommitOperationAdd(name, str(directory / name)) for name in names]
            files.append(CommitOperationAdd(SUMS, sums))
            return str(api.create_commit(repo, files, commit_message="An AlphaQ checkpoint").commit_url)
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        raise OSError(f"{repo}: the Hugging Face Hub did not take it: {_reason(error)}") from error
    raise ValueError(f"{repo}: expected a private repository, got one that others can read: change it on the Hub first")


def _reason(error: Exception) -> str:
    """The message in one line, with the way out where it is known."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    way_out = ": log in with 'hf auth login', or set HF_TOKEN to a token that may write" if status in (401, 403) else ""
    return f"{reason(error)}{way_out}"


def _without_sum(directory: Path, names: set[str]) -> list[str]:
    files = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}
    return sorted(map(printed, files - names))
