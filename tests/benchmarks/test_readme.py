"""The tables of README and of the documents say what the committed results, and the commands, say."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from alphaq_vllm.format import stored_bits_per_weight
from benchmarks import models, sizes

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README, QUALITY, BENCHMARKS = "README.md", "docs/quality.md", "docs/benchmarks.md"
# Predictions that a column is about.
TOKENS = {"docs-moe": 29952, "stdlib-mixtral-4": 20480, "stdlib-mixtral": 19968}
# Models whose rows are of the format as it is.
CURRENT = {"docs-moe", "stdlib-mixtral-4"}
WITH_AMX, WITHOUT_AMX = "Intel(R) Xeon(R) Processor", "Intel(R) Xeon(R) Processor @ 2.50GHz"
MACHINES = {"AMD EPYC": "AMD EPYC", "Intel Xeon with AMX": WITH_AMX, "Intel Xeon": WITHOUT_AMX}
# Names of generated checkpoints.
SERVED = {"all 24 layers": "qwen1.5-moe-a2.7b", "4 layers": "qwen1.5-moe-a2.7b-4-layers"}


def results(name):
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def tables(file):
    """Every table of a document: its columns' names, and its rows of cells."""
    found, lines = [], []
    for line in [*(ROOT / file).read_text().splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif lines:
            found.append((lines[0], lines[2:]))
            lines = []
    return found


def by_column(file, *names):
    """The tables that have these columns."""
    return [(head, rows) for head, rows in tables(file) if set(names) <= set(head)]


def method(text):
    """How a row of a document or of the results was made: its arguments in any order, or its tool."""
    text = text.replace("(the default)", "").strip().strip("*`")
    return text.split(" ")[0] if text.startswith(("AWQ", "GPTQ")) else tuple(sorted(shlex.split(text)))


def measured(rows):
    """The last row of each model, number of tokens and way to quantize."""
    return {(row["model"], row["tokens"], method(row["arguments"] or row["variant"])): row for row in rows}


MEASURED = measured(results("quality.jsonl"))
# In the format before: of models whose weights are gone, and what a document compares with them.
EARLIER = measured(row for row in results("quality.jsonl") if row["date"] < "2026-11-28")
FIGURES = {
    "perplexity": lambda row: f"{100 * (row['perplexity'] / row['reference_perplexity'] - 1):+.1f} %",
    "KL": lambda row: f"{row['kl']:.3f}",
}
QUALITY_TABLES = [
    (file, head, rows) for file in (README, QUALITY) for head, rows in by_column(file, "`convert` with", "stored bits")
]


def test_the_tables_of_quality_are_found():
    assert [len(rows) for _, _, rows in QUALITY_TABLES] == [9, 28, 10, 4, 15]
    assert len(by_column(README, "stored bits")) == 1
    assert len(by_column(QUALITY, "stored bits")) == 4


@pytest.mark.parametrize(("file", "head", "rows"), QUALITY_TABLES)
def test_quality(file, head, rows):
    columns = [column.partition(": ")[::2] for column in head[2:]]
    models = list(dict.fromkeys(model for model, _ in columns))
    found = MEASURED if CURRENT.issuperset(models) else EARLIER
    for how, stored_bits, *cells in rows:
        by_model = {model: found.get((model, TOKENS[model], method(how))) for model in models}
        for (model, figure), cell in zip(columns, cells, strict=True):
            row = by_model[model]
            assert cell == (FIGURES[figure](row) if row else "not measured"), (file, how, model)
        # One number where they agree.
        stored = [float(number) for number in stored_bits.split(", ")]
        for row, number in zip(filter(None, by_model.values()), stored * (len(models) // len(stored)), strict=True):
            assert number == pytest.approx(row["stored_bits"], abs=0.006), (file, how)


# Text that the rows of a model are about.
WEIGHTS_ONLY = {"docs-moe": "held-out.txt", "reference-moe": "calibration.txt", "stdlib-mixtral-4": "report.txt"}
MAPS = {(row["model"], *row["text"], row["variant"], row["bits"]): row for row in results("weights_only.jsonl")}


def test_maps_from_weights_alone():
    found = [(head, rows) for head, rows in by_column(QUALITY, "map") if "KL at 3 bits" not in head]
    assert [len(rows) for _, rows in found] == [13, 13, 13]
    for head, rows in found:
        for name, *cells in rows:
            for column, cell in zip(head[1:], cells, strict=True):
                model, bits = column.removesuffix(" bits").split(", ")
                row = MAPS.get((model, WEIGHTS_ONLY[model], name, float(bits)))
                control = f" ({np.mean(row['control_kl']):.4f})" if row and row["control_kl"] else ""
                assert cell == (f"{row['kl']:.4f}{control}" if row else "not measured"), (name, column)


def test_slices_of_a_mature_network():
    (*_, line) = results("slices.jsonl")
    ((_, told),) = by_column(QUALITY, "told by")
    places = ("all", "gate_proj", "up_proj", "down_proj")
    for name, *cells in told:
        row = line["correlations"][name]
        within = f"{row['within']:+.2f} ± {row['within_error']:.2f}"
        assert cells == [*(f"{row[place]:+.2f}" for place in places), within], name
    ((_, maps),) = by_column(QUALITY, "map", "KL at 3 bits")
    for name, *cells in maps:
        found = [line["maps"][bits][name] for bits in ("2.5", "3")]
        controls = [f" ({np.mean(row['control_kl']):.2f})" if "control_kl" in row else "" for row in found]
        assert cells == [f"{row['kl']:.2f}{control}" for row, control in zip(found, controls, strict=True)], name
    assert (len(told), len(maps)) == (len(line["correlations"]), len(line["maps"]["3"]))


# The maps that the options of a way in stand for.
CHOSEN = {
    "--noise expert --quantizer mse": "expert",
    "--mode uniform --quantizer mse": "uniform",
    "--mode random --quantizer mse": "random",
    "--preset paper --quantizer mse": "paper",
}


def test_defaults_by_way_in():
    ((head, rows),) = by_column(QUALITY, "way in")
    assert len(rows) == 6
    for _, how, *cells in rows:
        # What the converter does by itself where it can run the model.
        named = "" if "propagated" in how else how.strip("`")
        for column, cell in zip(head[2:], cells, strict=True):
            if column in BUDGETS:
                assert cell == at_budgets(column, named), (how, column)
                continue
            model, _, budgets = column.removesuffix(" bits").partition(": KL at ")
            maps = [MAPS.get((model, WEIGHTS_ONLY[model], CHOSEN.get(named), float(b))) for b in budgets.split(" / ")]
            assert cell == " / ".join(FIGURES["KL"](row) if row else "-" for row in maps), (how, column)


BUDGETS = {f"{model}: KL at 2.5 / 3 / 3.5 bits": model for model in CURRENT}


def at_budgets(column, how):
    """What conversions leave, as a cell of this column says it."""
    model = BUDGETS[column]
    rows = [MEASURED[(model, TOKENS[model], method(f"--bits {bits} {how}"))] for bits in ("2.5", "3", "3.5")]
    return " / ".join(FIGURES["KL"](row) for row in rows)


def test_quality_against_time():
    ((head, rows),) = by_column(QUALITY, "`--effort`")
    lines = [
        row
        for row in results("convert.jsonl")
        if (row.get("shape"), row.get("layers"), row.get("workers")) == ("qwen1.5-moe-a2.7b", 1, 2)
    ]
    for effort, seconds, cpu_seconds, peak, how, *cells in rows:
        arguments = "" if effort == "1" else f"--effort {effort}"
        *_, line = (row for row in lines if row["arguments"] == arguments)
        assert [seconds, cpu_seconds] == [f"{line[key]:.0f}" for key in ("seconds", "cpu_seconds")], effort
        assert peak == f"{line['peak_bytes'] / 1e9:.2f} GB"
        assert cells == [at_budgets(column, how.strip("`")) for column in head[5:]]
    assert [row[0] for row in rows] == ["0", "1", "2"]


def serving(model, kind, clients, cpu=WITH_AMX):
    """The last line of a format such as ``alphaq, 3.5 bits`` on a processor."""
    name, _, bits = kind.partition(", ")
    (*_, row) = (
        row
        for row in results("serving.jsonl")
        if "error" not in row
        and (row["model"], row["cpu"]) == (SERVED[model], cpu)
        and (row["format"], row["bits"]) == (name, float(bits.split()[0]) if bits else None)
        and row["concurrency"] == int(clients)
    )
    return row


NAMES = {
    "Qwen1.5-MoE-A2.7B": "qwen1.5",
    "Mixtral-8x7B": "mixtral",
    "Qwen3-30B-A3B": "qwen3-30b",
    "DeepSeek-V2-Lite": "deepseek-v2-lite",
}
ON_A_CPU = {
    "AlphaQ, 2.5 bits": ("alphaq", 2.5),
    "AlphaQ, 3.5 bits": ("alphaq", 3.5),
    "AlphaQ, 2.5 bits, int8": ("alphaq, int8", 2.5),
    "AlphaQ, 3.5 bits, int8": ("alphaq, int8", 3.5),
    "vLLM, bf16": ("vllm-bf16", None),
    "vLLM, 4 bits": ("vllm-int4", None),
    "PyTorch, bf16": ("torch-bf16", None),
}


def figure(time):
    return f"{time:.3g}" if time < 1000 else f"{time:.0f}"


def test_kernels_on_a_cpu():
    found = [table for file in (README, BENCHMARKS) for table in by_column(file, "one layer, ms")]
    assert [len(rows) for _, rows in found] == [4, 16, 3, 3, 2]
    latest = {
        (row["instruction_set"], row["model"], row["kernel"], row["bits"], row.get("tokens")): row["ms"]
        for row in results("cpu_kernels.jsonl")
        if row["threads"] == 2 and "ms" in row
    }
    sets = ("avx512_vnni", "avx512_vnni", "avx2", "amx", "avx512_vnni")
    for instruction_set, (head, rows) in zip(sets, found, strict=True):
        for model, kernel, *cells in rows:
            setting = (instruction_set, NAMES[model], *ON_A_CPU[kernel])
            assert cells == [figure(latest[(*setting, int(tokens))]) for tokens in head[2:]], (model, kernel)


ON_A_GPU = {
    "AlphaQ, 2.5 bits": ("alphaq", 2.5),
    "AlphaQ, 3.5 bits": ("alphaq", 3.5),
    "PyTorch, bf16": ("torch-bf16", None),
}


def microseconds(model, kernel, tokens):
    """The last that were measured, as they are written."""
    name, bits = ON_A_GPU[kernel]
    setting = (NAMES[model], name, bits, int(tokens))
    (*_, us) = (
        row["us"]
        for row in results("kernels.jsonl")
        if (row["model"], row["kernel"], row.get("bits"), row["tokens"]) == setting
    )
    return figure(us)


def test_kernels_on_a_gpu():
    ((head, rows),) = by_column(BENCHMARKS, "one layer, us", "1", "4096")
    assert len(rows) == 9
    for model, kernel, *cells in rows:
        assert cells == [microseconds(model, kernel, tokens) for tokens in head[2:]], (model, kernel)
    text = " ".join((ROOT / README).read_text().split())
    for kernel in ("AlphaQ, 3.5 bits", "PyTorch, bf16"):
        *cells, last = [microseconds("Qwen3-30B-A3B", kernel, tokens) for tokens in head[2:]]
        assert f"{', '.join(cells)} and {last} us" in text


def test_serving():
    ((head, rows),) = by_column(BENCHMARKS, "format", "clients", "first token")
    assert head == ["layers", "format", "clients", "first token", "next token", "tokens a second"]
    assert len(rows) == 6
    for model, kind, clients, *cells in rows:
        row = serving(model, kind, clients)
        figures = [f"{row['mean_ttft_ms']:.0f} ms", f"{row['mean_tpot_ms']:.1f} ms", f"{row['output_throughput']:.1f}"]
        assert cells == figures, (model, kind, clients)
    one, eight = (serving("all 24 layers", "alphaq, 3.5 bits", clients)["output_throughput"] for clients in (1, 8))
    text = " ".join((ROOT / README).read_text().split())
    assert f"gives one client {one:.1f} tokens a second, eight {eight:.1f}" in text


def test_serving_beside_llama_cpp():
    ((_, rows),) = by_column(BENCHMARKS, "program", "one client")
    *_, theirs = results("llama_cpp.jsonl")
    one, eight = (serving("all 24 layers", "alphaq, 3.5 bits", clients, WITHOUT_AMX) for clients in (1, 8))
    assert theirs["cpu"] == one["cpu"] == eight["cpu"]
    assert theirs["date"][:10] == one["date"][:10] == eight["date"][:10]
    speeds = theirs["tokens_per_second"]
    figures = [
        # With the scales of rows of 2048.
        [one["checkpoint_bytes"], stored_bits_per_weight(one["bits"], 64) + 16 / 2048]
        + [one["input"] / one["mean_ttft_ms"] * 1e3]
        + [clients / row["mean_tpot_ms"] * 1e3 for clients, row in ((1, one), (8, eight))],
        [theirs["file_bytes"], theirs["expert_bits"], *(speeds[key] for key in ("prefill", "decode_1", "decode_8"))],
    ]
    for (_, *cells), (size, bits, *tokens) in zip(rows, figures, strict=True):
        assert cells == [f"{size / 1e9:.2f} GB", f"{bits:.2f}", *(f"{speed:.1f}" for speed in tokens)]
    (*_, ours, ours_of_eight), (*_, llama, llama_of_eight) = rows
    text = " ".join((ROOT / README).read_text().split())
    assert f"one client gets {ours} tokens a second of an answer, eight {ours_of_eight};" in text
    assert f"from llama.cpp {llama} and {llama_of_eight}" in text


def conversions(what, machine, date):
    """Source, seconds and memory of the runs of a day, as they are written."""
    for row in results("convert.jsonl"):
        if (row.get("tool"), row["cpu"], row["date"][:10]) == (what, MACHINES[machine], date):
            yield [f"{row['source_bytes'] / 1e6:.1f} MB", f"{row['seconds']:.0f}", f"{row['peak_bytes'] / 1e6:.0f} MB"]


def test_conversion():
    (_, peers), (_, shapes) = by_column(BENCHMARKS, "peak memory", "seconds")
    assert (len(peers), len(shapes)) == (12, 8)
    for what, *cells, machine, date in peers:
        assert cells in list(conversions(what, machine, date)), what
    for model, layers, *cells, machine, date in shapes:
        assert cells in list(conversions_of_shapes(CONVERTED[model], layers, machine, date)), (model, layers)


CONVERTED = {
    "Qwen1.5-MoE-A2.7B": "qwen1.5-moe-a2.7b",
    "Mixtral-8x7B": "mixtral-8x7b",
    "DeepSeek-V2-Lite": "deepseek-v2-lite",
    "DeepSeek-V3": "deepseek-v3",
}


def conversions_of_shapes(shape, layers, machine, date):
    """Source, seconds, CPU seconds and memory of the runs of a day by default, as they are written."""
    for row in results("convert.jsonl"):
        if "shape" not in row:
            continue
        run = (row["shape"], str(row["layers"]), row["cpu"], row["date"][:10], row["arguments"], row["workers"])
        if run == (shape, layers, MACHINES[machine], date, "", 2):
            size, peak = (f"{row[key] / 1e9:.2f} GB" for key in ("source_bytes", "peak_bytes"))
            yield [size, f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}", peak]


def test_sizes():
    assert "\n".join(sizes.table()) in (ROOT / README).read_text()


def test_models():
    assert "\n\n" + "\n".join(models.table()) + "\n\n" in (ROOT / README).read_text()
