"""README's tables say what the committed results say."""

import json
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Predictions that README's table is about; its columns, two for each model.
TOKENS = {"docs-moe": 29952, "stdlib-mixtral-2": 20480}


def results(name):
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def table(heading):
    """Cells of the first table below a heading of README, without its head."""
    lines = (ROOT / "README.md").read_text().partition(f"\n{heading}\n")[2].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def method(text):
    """How a row of README or of the results was made: its arguments in any order, or its tool."""
    text = text.strip("*`")
    return text.split(" ")[0] if text.startswith(("AWQ", "GPTQ")) else tuple(sorted(shlex.split(text)))


QUALITY = table("## What does it cost in quality?")
SERVING = table("### How fast on a CPU?")


@pytest.mark.parametrize(("number", "model"), list(enumerate(TOKENS)))
def test_quality(number, model):
    measured = {
        method(row["arguments"] or row["variant"]): row
        for row in results("quality.jsonl")
        if (row["model"], row["tokens"]) == (model, TOKENS[model])
    }
    assert len(QUALITY) > 10
    for how, stored_bits, *cells in QUALITY:
        row = measured[method(how)]
        increase = 100 * (row["perplexity"] / row["reference_perplexity"] - 1)
        expected = [f"{increase:+.1f} %", f"{row['kl']:.3f}"]
        assert cells[2 * number : 2 * number + 2] == expected, how
        assert float(stored_bits) == pytest.approx(row["stored_bits"], abs=0.006)


def test_serving():
    measured = {
        (row["format"], row["bits"], row["concurrency"]): row
        for row in results("serving.jsonl")
        if "error" not in row and row["serve_args"] == []
    }
    for name, clients, first, following, throughput in SERVING:
        kind, _, bits = name.partition(", ")
        row = measured[kind, float(bits.split()[0]) if bits else None, int(clients)]
        figures = [f"{row['mean_ttft_ms']:.0f} ms", f"{row['mean_tpot_ms']:.1f} ms", f"{row['output_throughput']:.0f}"]
        assert [first, following, throughput] == figures
