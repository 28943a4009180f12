"""One page of all results: ``benchmarks/results/README.md`` and its plots, from the JSON lines beside it.

    python -m benchmarks.report [--results DIRECTORY]

A row is shown as it was measured; where a setting was measured several times, the last one counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def read(file: Path) -> list[Row]:
    """The lines of a file, none if it does not exist."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, numbers to the right.

    >>> table(["a", "b"], [["x", "1"]])
    ['| a | b |', '|:--|--:|', '| x | 1 |']
    """
    lines = [header, *rows]
    rule = ["|:--|", *("--:|" for _ in header[1:])]
    return [f"| {' | '.join(lines[0])} |", "".join(rule), *(f"| {' | '.join(line)} |" for line in lines[1:])]


def quality(rows: list[Row], directory: Path) -> list[str]:
    """A table and a plot for each model and text."""
    latest = {(_setting(row), row["variant"], row["arguments"]): row for row in rows}
    page = []
    for number, (_, group) in enumerate(groupby(sorted(latest.values(), key=_setting), _setting), 1):
        measured = list(group)
        one = measured[-1]
        page += [
            f"## Quality: {one['model']}",
            "",
            _describe(one),
            "",
            *plot_quality(measured, directory / f"quality-{number}.png"),
            *table(
                ["variant", "stored bits", "perplexity", "over the model", "loss", "KL", "top-1"],
                [
                    [
                        f"{row['variant']}<br>`{row['arguments']}`" if row["arguments"] else row["variant"],
                        f"{row['stored_bits']:.2f}",
                        f"{row['perplexity']:.3f}",
                        f"{row['perplexity'] / row['reference_perplexity'] - 1:+.1%}",
                        f"{row['loss_increase']:+.4f} ± {row['loss_increase_error']:.4f}",
                        f"{row['kl']:.4f} ± {row['kl_error']:.4f}",
                        f"{row['top1']:.3f}",
                    ]
                    for row in sorted(measured, key=lambda row: (row["stored_bits"], -row["kl"]))
                ],
            ),
            "",
        ]
    return page


def weights_only(rows: list[Row]) -> list[str]:
    """A table for each model and text: the KL divergence of each map and, in brackets, of its control."""
    latest = {(_setting(row), row["variant"], row["bits"]): row for row in rows}
    page = []
    for _, group in groupby(sorted(latest.values(), key=_setting), _setting):
        measured = list(group)
        budgets = sorted({row["bits"] for row in measured})
        cells = {(row["variant"], row["bits"]): beside_control(row) for row in measured}
        page += [
            f"## Widths from weights alone: {measured[0]['model']}",
            "",
            "KL divergence with its standard error, and in brackets the mean of its controls: as many matrices of "
            f"each width, at random. {_describe(measured[-1])}",
            "",
            *table(
                ["map", *(f"{bits:g} bits" for bits in budgets)],
                [
                    [name, *(cells.get((name, bits), "") for bits in budgets)]
                    for name in dict.fromkeys(row["variant"] for row in measured)
                ],
            ),
            "",
        ]
    return page


def beside_control(row: Row) -> str:
    """A KL divergence, its standard error and its control's.

    >>> beside_control({"kl": 0.0463, "kl_error": 0.0007, "control_kl": [0.04, 0.05]})
    '0.0463 ± 0.0007 (0.0450)'
    """
    control = row["control_kl"]
    beside = f" ({sum(control) / len(control):.4f})" if control else ""
    return f"{row['kl']:.4f} ± {row['kl_error']:.4f}{beside}"


def _setting(row: Row) -> tuple[Any, ...]:
    """What rows must share to be compared."""
    return tuple(row[key] for key in ("model", "fingerprint", "text_sha256", "tokens", "context", "dtype"))


def _describe(row: Row) -> str:
    return (
        f"{row['architecture']}, {row['tokens']} tokens of {', '.join(row['text'])} in windows of {row['context']}, "
        f"computed in {row['dtype']}; perplexity of the model itself {row['reference_perplexity']:.3f}. Loss in nats a "
        "token, KL divergence from the model itself, each with its standard error; top-1: share of tokens where both "
        f"agree. torch {row['torch']}, transformers {row['transformers']}, {row['gpu'] or row['cpu']}, "
        f"{row['date'][:10]}."
    )


def plot_quality(rows: list[Row], file: Path) -> list[str]:
    """Plot KL divergence against stored bits, and return the lines that show it; none if there are less than 3 sizes.

    A line is for what was measured at three sizes or more, a star for another tool.
    """
    if len({row["stored_bits"] for row in rows if "bits" in row}) < 3:
        return []
    with _axes(file) as axes:
        for variant in dict.fromkeys(row["variant"] for row in rows):
            points = sorted((row["stored_bits"], row["kl"]) for row in rows if row["variant"] == variant)
            if len(points) > 2 or "llm-compressor" in variant:
                axes.plot(*zip(*points, strict=True), "o-" if len(points) > 2 else "*", label=variant, linewidth=1)
        axes.set(xlabel="stored bits per weight of an expert", ylabel="KL divergence, nats a token", yscale="log")
    return [f"![KL divergence against stored bits]({file.name})", ""]


def conversion(rows: list[Row]) -> list[str]:
    """Speed and memory of the converter, alone and beside other tools."""
    compared = [row for row in rows if "tool" in row]
    return [*_converter([row for row in rows if "tool" not in row]), *_converters(compared)]


def _converters(rows: list[Row]) -> list[str]:
    latest = {(row["model"], row["source_bytes"], row["cpu"], row["gpu"], row["tool"]): row for row in rows}
    if not latest:
        return []
    header = [
        "model, tool",
        "source",
        "checkpoint",
        "seconds",
        "CPU seconds",
        "peak memory",
        "machine",
        "date",
        "commit",
    ]
    lines = [
        [
            f"{row['model']}, {row['tool']}",
            f"{row['source_bytes'] / 1e6:.1f} MB",
            f"{row['checkpoint_bytes'] / 1e6:.1f} MB",
            f"{row['seconds']:.0f}",
            f"{row['cpu_seconds']:.0f}",
            f"{row['peak_bytes'] / 1e6:.0f} MB",
            f"{row['gpu'] or row['cpu']}, {row['cores']} cores",
            row["date"][:10],
            row["commit"],
        ]
        for row in latest.values()
    ]
    commands = {row["made_by"]["command"]: row["made_by"] for row in latest.values() if row["made_by"]}
    made_by = [f"- `{command}`, llm-compressor {by['llmcompressor']}" for command, by in commands.items()]
    about = "The whole command, start of Python included; AlphaQ at 3.5 bits, GPTQ and AWQ at 4 by llm-compressor:"
    return ["## Conversion by other tools", "", about, *made_by, "", *table(header, lines), ""]


def _converter(rows: list[Row]) -> list[str]:
    """The last run of each shape and setting, and the phases of each."""
    if not rows:
        return []
    latest = {(row["shape"], row["layers"], row["arguments"], row["workers"], row["cpu"]): row for row in rows}
    phases = list(dict.fromkeys(phase for row in latest.values() for phase in row["phases"]))
    header = [
        "layers of",
        "arguments",
        "source",
        "seconds",
        "expected",
        "CPU seconds",
        *phases,
        "peak memory",
        "workers",
    ]
    lines = [
        [
            f"{row['layers']} x {row['shape']}",
            f"`{row['arguments']}`" if row["arguments"] else "",
            f"{row['source_bytes'] / 1e9:.2f} GB",
            f"{row['seconds']:.0f}",
            f"{sum(row['expected'].values()):.0f}",
            f"{row['cpu_seconds']:.0f}",
            *(f"{row['phases'].get(phase, 0):.0f}" for phase in phases),
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            str(row["workers"]),
            f"{row['load']:.1f}",
            row["cpu"],
            row["date"][:10],
            row["commit"],
        ]
        for row in latest.values()
    ]
    about = (
        "`python -m benchmarks.convert`; seconds of the whole command and of its phases; expected before they began."
    )
    header += ["load", "CPU", "date", "commit"]
    return ["## Conversion", "", about, "", *table(header, lines), ""]


def serving(rows: list[Row], directory: Path) -> list[str]:
    """A table and a plot for each model, machine and kind of request."""

    def setting(row: Row) -> tuple[str, ...]:
        keys = ("model", "checkpoint_of", "input", "output", "serve_args", "cpu", "cores", "gpu", "vllm")
        return tuple(str(row.get(key)) for key in keys)

    latest = {(setting(row), row["format"], row["bits"], row.get("concurrency")): row for row in rows}
    page = []
    for number, (_, group) in enumerate(groupby(sorted(latest.values(), key=setting), setting), 1):
        measured = list(group)
        one = measured[-1]
        page += [
            f"## Serving: {one['model']}",
            "",
            f"`vllm serve {' '.join(one['serve_args'])}` driven by `vllm bench serve`, random prompts of "
            f"{one['input']} tokens, answers of {one['output']}; vLLM {one['vllm']}, {one['gpu'] or one['cpu']}, "
            f"{one['cores']} cores.",
            "",
            *plot_serving(measured, directory / f"serving-{number}.png"),
            *table(
                [
                    "format", "clients", "checkpoint", "load", "first token", "next token", "tokens/s", "cache", "date",
                    "commit",
                ],
                [
                    [
                        _format(row),
                        str(row["concurrency"]),
                        f"{row['checkpoint_bytes'] / 1e6:.1f} MB",
                        f"{row['load_seconds']:.0f} s",
                        f"{row['mean_ttft_ms']:.0f} ms",
                        f"{row['mean_tpot_ms']:.1f} ms",
                        f"{row['output_throughput']:.0f}",
                        f"{row['cache_tokens']} tokens",
                        row["date"][:10],
                        row["commit"],
                    ]
                    for row in measured
                    if "error" not in row
                ],
            ),
            "",
            *(f"- {_format(row)}: no figures, {row['error']}" for row in measured if "error" in row),
            "",
        ]  # fmt: skip
    return page


def _format(row: Row) -> str:
    return f"{row['format']}, {row['bits']:g} bits" if row["bits"] else row["format"]


def plot_serving(rows: list[Row], file: Path) -> list[str]:
    """Plot throughput against concurrency, and return the lines that show it; none for less than two formats."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if "error" not in row:
            lines.setdefault(_format(row), []).append((row["concurrency"], row["output_throughput"]))
    if len(lines) < 2:
        return []
    with _axes(file) as axes:
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
        axes.set(xlabel="clients at once", ylabel="output tokens a second", xscale="log", yscale="log")
    return [f"![Throughput against concurrency]({file.name})", ""]


@contextmanager
def _axes(file: Path) -> Iterator[Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    yield axes
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def zero_shot(rows: list[Row]) -> list[str]:
    """Accuracy by task."""
    latest = {(row["model"], row["limit"], tuple(row["accuracy"])): row for row in rows}
    if not latest:
        return []
    lines = [
        [
            row["model"] + (f" ({row['limit']} questions a task)" if row["limit"] else ""),
            f"{row['mean']:.2%}",
            ", ".join(f"{task} {value:.2%}" for task, value in row["accuracy"].items()),
            *(str(row[key]) for key in ("vllm", "date", "commit")),
        ]
        for row in latest.values()
    ]
    return ["## Zero-shot accuracy", "", *table(["model", "mean", "tasks", "vLLM", "date", "commit"], lines), ""]


def plot_kernels(rows: list[Row], directory: Path) -> list[str]:
    """Plot time against tokens for each model, with the limit of each of our rows."""
    page = []
    for model in dict.fromkeys(row["model"] for row in rows):
        file = directory / f"kernels-{model}.png"
        with _axes(file) as axes:
            lines: dict[str, list[tuple[int, float]]] = {}
            for row in rows:
                if row["model"] == model:
                    name = f"{row['kernel']} {row.get('bits', '')}".strip()
                    lines.setdefault(name, []).append((row["tokens"], row["us"]))
                    if "fraction" in row:
                        lines.setdefault(f"limit of {name}", []).append((row["tokens"], row["us"] * row["fraction"]))
            for name, points in lines.items():
                axes.plot(*zip(*sorted(points), strict=True), ":" if name.startswith("limit") else "o-", label=name)
            axes.set(xlabel="tokens", ylabel="microseconds", xscale="log", yscale="log", title=model)
        page += [f"![Time against tokens, {model}]({file.name})", ""]
    return page


def kernels(rows: list[Row], directory: Path) -> list[str]:
    """Times of the kernels, where their results were right."""
    latest = {tuple(row.get(key) for key in ("model", "kernel", "bits", "tokens", "gpu")): row for row in rows}
    timed = [row for row in latest.values() if "us" in row]
    if not timed:
        return []
    header = ["model", "kernel", "bits", "tokens", "us", "of the limit", "GPU", "date", "commit"]
    lines = [
        [
            *(str(row.get(key, "")) for key in ("model", "kernel", "bits", "tokens")),
            f"{row['us']:.1f}",
            f"{row['fraction']:.0%}" if "fraction" in row else "",
            *(str(row.get(key, "")) for key in ("gpu", "date", "commit")),
        ]
        for row in timed
    ]
    return ["## Kernels", "", *plot_kernels(timed, directory), *table(header, lines), ""]


def cpu_kernels(rows: list[Row]) -> list[str]:
    """Milliseconds of one layer's routed experts on CPUs, and what part of them reading the weights takes."""

    def setting(row: Row) -> tuple:
        return row["model"], row["cpu"], row["instruction_set"], row["threads"]

    page = []
    for (model, cpu, instruction_set, threads), group in groupby(sorted(rows, key=setting), setting):
        latest = {(row["kernel"], row["bits"] or 0, row["tokens"]): row for row in group if "ms" in row}
        if not latest:
            continue
        tokens = sorted({n for _, _, n in latest})
        last = next(reversed(latest.values()))
        lines = [
            [f"{kernel}, {bits} bits" if bits else kernel] + [_of_limit(latest.get((kernel, bits, n))) for n in tokens]
            for kernel, bits in sorted({(kernel, bits) for kernel, bits, _ in latest})
        ]
        page += [
            f"## Experts of a layer on a CPU: {model}, {instruction_set}, {threads} threads",
            "",
            f"Milliseconds by number of tokens, and in brackets how much of them reading the experts in use takes at "
            f"{last['bytes_per_second'] / 1e9:.1f} GB/s. {cpu}, torch {last['torch']}, {last['date'][:10]}, commit "
            f"{last['commit']}.",
            "",
            *table(["kernel", *map(str, tokens)], lines),
            "",
        ]
    return page


def _of_limit(row: Row | None) -> str:
    return f"{row['ms']:.3g} ({row['limit_ms'] / row['ms']:.0%})" if row else ""


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIRECTORY")
    return parser


def main() -> None:
    """The command."""
    directory = build_parser().parse_args().results
    page = [
        "# Results",
        "",
        "Written by `python -m benchmarks.report` from the JSON lines in this folder.",
        "",
        *quality(read(directory / "quality.jsonl"), directory),
        *weights_only(read(directory / "weights_only.jsonl")),
        *conversion(read(directory / "convert.jsonl")),
        *serving(read(directory / "serving.jsonl"), directory),
        *zero_shot(read(directory / "zero_shot.jsonl")),
        *kernels(read(directory / "kernels.jsonl"), directory),
        *cpu_kernels(read(directory / "cpu_kernels.jsonl")),
    ]
    (directory / "README.md").write_text("\n".join(page))


if __name__ == "__main__":
    main()
