"""One page of all results: ``benchmarks/results/README.md`` and its plots, from the JSON lines beside it.

    python -m benchmarks.report [--results DIRECTORY]

A row is shown as it was measured; where a setting was measured several times, the last one counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        points = sorted((row["stored_bits"], row["kl"]) for row in rows if row["variant"] == variant)
        if len(points) > 2 or "llm-compressor" in variant:
            axes.plot(*zip(*points, strict=True), "o-" if len(points) > 2 else "*", label=variant, linewidth=1)
    axes.set(xlabel="stored bits per weight of an expert", ylabel="KL divergence, nats a token", yscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return [f"![KL divergence against stored bits]({file.name})", ""]


def conversion(rows: list[Row]) -> list[str]:
    """Speed and memory of the converter."""
    if not rows:
        return []
    header = [
        "layers x experts",
        "source",
        "seconds",
        "MB/s and core",
        "peak memory",
        "cores",
        "load",
        "date",
        "commit",
    ]
    lines = [
        [
            f"{row['layers']} x {row['experts']}",
            f"{row['source_bytes'] / 1e9:.2f} GB",
            f"{row['seconds']:.0f}",
            f"{row['bytes_per_second_and_core'] / 1e6:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f} MB",
            str(row["workers"]),
            f"{row['load']:.1f}",
            row["date"][:10],
            row["commit"],
        ]
        for row in rows
    ]
    return ["## Conversion", "", "`python -m benchmarks.convert`, Qwen1.5-MoE's layers.", "", *table(header, lines), ""]


def kernels(rows: list[Row]) -> list[str]:
    """Times of the kernels, where their results were right."""
    timed = [row for row in rows if "us" in row]
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
    return ["## Kernels", "", *table(header, lines), ""]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIRECTORY")
    directory = parser.parse_args().results
    page = [
        "# Results",
        "",
        "Written by `python -m benchmarks.report` from the JSON lines in this folder.",
        "",
        *quality(read(directory / "quality.jsonl"), directory),
        *conversion(read(directory / "convert.jsonl")),
        *kernels(read(directory / "kernels.jsonl")),
    ]
    (directory / "README.md").write_text("\n".join(page))


if __name__ == "__main__":
    main()
