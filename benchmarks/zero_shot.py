"""Zero-shot accuracy of a checkpoint as vLLM serves it, by lm-eval, on the tasks of the paper.

    python -m benchmarks.zero_shot CHECKPOINT [--tasks piqa,arc_easy,...] [--limit N] [--max-model-len 2048]

CHECKPOINT is any that vLLM loads: AlphaQ, another quantization or none. Needs ``pip install ".[eval]"`` and the tasks'
data, from the Hub or its cache. One JSON line goes to ``benchmarks/results/zero_shot.jsonl``. The exit status is 2 if
lm-eval or the data is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import torch

from benchmarks.machine import machine
from benchmarks.server import CPU_ENVIRONMENT

RESULTS = Path(__file__).parent / "results" / "zero_shot.jsonl"
TASKS = "piqa,arc_easy,arc_challenge,hellaswag,winogrande,boolq"


def load_tasks(names: list[str], include: Path | None) -> list[object]:
    """lm-eval's tasks with their data. Exits with status 2 and a message if they cannot be had."""
    try:
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError as error:
        _fail(f'expected lm-eval, got "{error}": pip install ".[eval]"')
    manager = TaskManager(include_path=str(include) if include else None)
    if unknown := set(names) - set(manager.all_tasks):
        _fail(f"--tasks: expected names out of those of lm-eval, got {', '.join(sorted(unknown))}")
    tasks = []
    for name in names:
        try:
            tasks += get_task_dict([name], manager).values()
        # Whatever library is asked for the data wraps the failure of its connection in an error of its own.
        except Exception as error:
            _fail(
                f"expected the data of {name} from the Hub or its cache (HF_HOME), got {type(error).__name__}: {error}"
            )
    return tasks


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def evaluate(checkpoint: str, tasks: list[object], limit: int | None, max_model_len: int) -> dict[str, float]:
    """Accuracy (0 to 1) by task."""
    from lm_eval import simple_evaluate

    if not torch.cuda.is_available():
        for name, value in CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    options = {"pretrained": checkpoint, "dtype": "bfloat16", "max_model_len": max_model_len}
    found = simple_evaluate(model="vllm", model_args=options, tasks=tasks, limit=limit, batch_size="auto")["results"]
    return {task: figures["acc,none"] for task, figures in found.items()}


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="directory, or name of a model on the Hub")
    parser.add_argument("--tasks", default=TASKS, help="default: %(default)s")
    parser.add_argument("--include", type=Path, metavar="DIR", help="of more tasks, as lm-eval's --include_path")
    parser.add_argument("--limit", type=int, help="questions of each task (default: all)")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="where lines are appended")
    return parser


def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    accuracy = evaluate(
        args.checkpoint, load_tasks(args.tasks.split(","), args.include), args.limit, args.max_model_len
    )
    row = {"model": Path(args.checkpoint).name, "limit": args.limit, "accuracy": accuracy}
    row |= {"mean": mean(accuracy.values()), **machine(), "vllm": version("vllm"), "lm_eval": version("lm_eval")}
    with args.results.open("a") as file:
        print(json.dumps(row), file=file)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
