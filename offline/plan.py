"""``python -m offline.plan``: what converting and serving a model will take, before its weights are downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from offline.cli import Parser, add_group_size, add_json_option, add_linear_bits, add_revision, given, run
from offline.operations.options import ConvertOptions
from offline.operations.prospect import plan
from offline.progress import format_bytes, format_seconds

_DESCRIPTION = """Say what converting and serving a model will take, from its config and the headers of its files alone.

Of a model on the Hugging Face Hub nothing else is downloaded, about a hundred kilobytes of each file. Said are the
family, or why the model cannot be converted; sizes at several averages of bits; with --gpus the memory of each, with
tensor and with expert parallelism, and what is left for the KV cache; and how long quantizing takes here."""

_EXAMPLES = """\
  python -m offline.plan Qwen/Qwen1.5-MoE-A2.7B
  python -m offline.plan Qwen/Qwen3-30B-A3B --bits 3 --gpus 2x24GiB
  python -m offline.plan ./mixtral --bits 2.5 --linear-bits 4 --gpus 24GiB --json"""

_WAYS = {None: "one GPU", "tensor": "tensor parallel", "expert": "expert parallel"}


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = Parser("plan", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("model", help="directory of a Hugging Face checkpoint, or name of a model on the Hub")
    parser.add_argument("--bits", metavar="AVERAGE", help="of the expert matrices (default 3.5)")
    parser.add_argument("--gpus", metavar="NxSIZE", help="what is to serve it, such as 2x24GiB")
    add_linear_bits(parser)
    add_group_size(parser)
    add_revision(parser)
    add_json_option(parser)
    args = parser.parse_args(arguments)
    result = plan(args.model, **given(args, "model"))
    print(json.dumps(result) if args.json else _text(result))


def _text(result: Mapping[str, Any]) -> str:
    model = result["model"] + (f" at {result['commit']}" if result["commit"] else "")
    if not result["covered"]:
        return f"{model}\ncannot be converted: {result['reason']}"
    how = "propagated errors and gptq" if result["runs"] else "errors of the weights and mse"
    size = result["group_size"]
    lines = [
        model,
        f"family:     {result['model_type']}, covered; by default converted with {how}",
        *([f"            {result['read_like']}"] if result["read_like"] else []),
        f"source:     {format_bytes(result['size'])} in {result['files']} files; {result['layers']} layers of "
        f"{result['experts']} experts, {result['matrices']} expert matrices of {result['expert_weights'] / 1e9:.3g} "
        "billion weights",
        *(
            [f"to draft:   {result['drafts']} expert matrices more, at {result['draft_bits']} bits by default"]
            if result["drafts"]
            else []
        ),
        f"groups:     {size} columns"
        + ("" if size == ConvertOptions.group_size else f": convert with --group-size {size}"),
        "",
        "   bits  as stored      experts  all weights",
    ]
    for row in result["budgets"]:
        asked = " <" if row["bits"] == result["bits"] else ""
        sizes = f"{format_bytes(row['experts']):>13}{format_bytes(row['size']):>13}"
        lines.append(f"{row['bits']:7g}{row['stored_bits']:11.4g}{sizes}{asked}")
    return "\n".join([*lines, *_serving(result), "", *_work(result)])


def _serving(result: Mapping[str, Any]) -> list[str]:
    """What each GPU holds, in each way to serve."""
    serving = result["serving"]
    if serving is None:
        return ["", "serving:    --gpus NxSIZE says how it lies on GPUs"]
    gpus = "1 GPU" if serving["gpus"] == 1 else f"{serving['gpus']} GPUs"
    lines = ["", f"on {gpus} of {format_bytes(serving['memory'])} each, at {result['bits']:g} bits:"]
    for way in serving["ways"]:
        name = f"  {_WAYS[way['parallel']]:17}"
        if not way["possible"]:
            lines.append(f"{name}not possible: {way['reason']}")
            continue
        smaller = f"; groups of {way['group_size']} there" if way["group_size"] != result["group_size"] else ""
        weights = f"{format_bytes(way['weights'])} of weights"
        if way["left"] <= 0:
            lines.append(f"{name}{weights}{smaller}: {format_bytes(-way['left'])} too much")
            continue
        tokens = f", at most {way['cache_tokens']:,} tokens" if way["cache_tokens"] else ""
        lines.append(f"{name}{weights}, {format_bytes(way['left'])} left for KV cache{tokens}{smaller}")
    return [
        *lines,
        "  A tenth of the memory is left to others. Activations and CUDA graphs take part of what is left, too.",
    ]


def _work(result: Mapping[str, Any]) -> list[str]:
    """What converting takes."""
    size = next(row["size"] for row in result["budgets"] if row["bits"] == result["bits"])
    processes = "1 process" if result["workers"] == 1 else f"{result['workers']} processes"
    more = "; the default takes longer: convert --dry-run, which needs the weights, estimates it"
    return [
        f"download:   {format_bytes(result['size'])}" if result["commit"] else "download:   nothing, it is here",
        f"disk:       {format_bytes(size)} for the result",
        f"time:       quantizing by mse about {format_seconds(result['seconds'])} here, on {processes}"
        + (more if result["runs"] else ", after measuring"),
    ]


if __name__ == "__main__":
    run(main)
