"""``python -m offline.upload``: a finished AlphaQ checkpoint to the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from offline.cli import Parser, add_json_option, given, run
from offline.operations.upload import upload
from offline.progress import format_bytes

_DESCRIPTION = """Upload an AlphaQ checkpoint to the Hugging Face Hub, in one commit.

All files are compared with their SHA-256 sums first. What has a sum is uploaded, and nothing else: a file that was
added to the directory is named and stays here. The card, templates, generation settings and licences may have been
edited. The repository is made if it does not exist. It is public unless --private is given or your organization says
otherwise. Log in with `hf auth login`, or set HF_TOKEN."""

_EXAMPLES = """\
  python -m offline.upload ./model-alphaq owner/model-alphaq
  python -m offline.upload ./model-alphaq owner/model-alphaq --private --json"""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = Parser("upload", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("checkpoint", type=Path, help="directory of an AlphaQ checkpoint")
    parser.add_argument("repo", help="repository on the Hub, as owner/name")
    parser.add_argument("--private", action="store_true", help="refuse a repository that others can read")
    add_json_option(parser)
    args = parser.parse_args(arguments)
    result = upload(args.checkpoint, args.repo, **given(args, "checkpoint", "repo"))
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['url']}: {result['files']} files, {format_bytes(result['size'])}")
    if result["left"]:
        print(f"not uploaded, for they have no checksum: {', '.join(result['left'])}")


if __name__ == "__main__":
    run(main)
