"""The commands that choose widths before a conversion, and the console script: measure, allocate, convert --dry-run."""

import importlib.metadata
import json
import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from offline import measure
from offline.allocation.bit_map import read_bit_map
from offline.sensitivity.stats import read_statistics

COMMANDS = ("plan", "measure", "allocate", "convert", "inspect", "validate", "dequantize", "upload")


@pytest.fixture(scope="module")
def stats(tiny_model, tmp_path_factory):
    """A file of statistics of the tiny Qwen2-MoE, not to be changed."""
    path = tmp_path_factory.mktemp("stats") / "stats.csv"
    measure.main([str(tiny_model("qwen2_moe")), "-o", str(path)])
    return path


def files_of(directory):
    return {path.name: path.stat().st_size for path in directory.iterdir()}


def config_bits(out):
    modules = json.loads((out / "config.json").read_bytes())["quantization_config"]["num_bits"]
    return {
        f"{module}.{expert}.{projection}": int(digit)
        for module, projections in modules.items()
        for projection, digits in projections.items()
        for expert, digit in enumerate(digits)
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(alphaq, name):
    status, out, _ = alphaq(name, "--help")
    assert status == 0
    assert f"examples:\n  python -m offline.{name} " in out
    assert "--json" in out


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"offline.{name}", run_name="__main__")
    assert not ended.value.code
    assert f"usage: python -m offline.{name}" in capsys.readouterr().out


def test_alphaq_lists_its_commands(alphaq):
    for arguments in ((), ("--help",)):
        status, out, _ = alphaq(*arguments)
        assert status == 0
        assert all(f"  {name} " in out for name in COMMANDS)


def test_alphaq_refuses_another_command(alphaq):
    status, _, error = alphaq("quantise")
    assert status == 2
    assert error == f"error: expected a command out of {', '.join(COMMANDS)}, got 'quantise'\n"


def test_console_script_is_declared():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="alphaq")
    tomllib = pytest.importorskip("tomllib")
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    declared = tomllib.loads(pyproject.read_text())["project"]["scripts"]["alphaq"]
    assert callable(importlib.metadata.EntryPoint("alphaq", declared, "console_scripts").load())
    assert all(script.value == declared for script in scripts)


def test_measure_writes_statistics_of_every_matrix(stats):
    statistics = read_statistics(stats)
    assert len(statistics.matrices) == 24
    assert statistics.widths == (2, 3, 4)
    assert statistics.origin.source == "qwen2_moe"


@pytest.mark.parametrize(
    ("options", "widths"), [(("--noise", "analytic"), ()), (("--candidate-bits", "1,8", "--group-size", "32"), (1, 8))]
)
def test_measure_takes_what_it_is_told_to(alphaq, tiny_model, tmp_path, options, widths):
    status, out, _ = alphaq("measure", tiny_model("mixtral"), "-o", tmp_path / "s.csv", *options, "--json")
    assert status == 0
    result = json.loads(out)
    assert (result["matrices"], result["reused"], tuple(result["widths"])) == (24, False, widths)
    assert read_statistics(tmp_path / "s.csv").widths == widths


def test_measure_uses_a_valid_file_again(alphaq, tiny_model, stats):
    before = stats.read_bytes(), stats.stat().st_mtime_ns
    status, out, error = alphaq("measure", tiny_model("qwen2_moe"), "-o", stats)
    assert status == 0
    assert "still valid for 24 matrices" in out
    assert "measure:" not in error
    assert (stats.read_bytes(), stats.stat().st_mtime_ns) == before


def test_measure_refuses_to_replace_a_file_of_another_source(alphaq, tiny_model, stats):
    before = stats.read_bytes()
    status, _, error = alphaq("measure", tiny_model("mixtral"), "-o", stats)
    assert status == 2
    assert "these statistics are out of date: fingerprint" in error
    assert stats.read_bytes() == before


def test_measure_finds_out_first_that_it_cannot_write(alphaq, tiny_model, tmp_path):
    status, _, error = alphaq("measure", tiny_model("qwen2_moe"), "-o", tmp_path / "no" / "stats.csv")
    assert status == 2
    assert "No such file or directory" in error
    assert "measure:" not in error


def test_allocate_prints_what_it_chose_and_convert_takes_it(alphaq, tiny_model, stats, tmp_path):
    bit_map = tmp_path / "map.json"
    status, out, _ = alphaq("allocate", stats, "--bits", "3.3", "-o", bit_map)
    assert status == 0
    for part in ("average bits:     3.2917 by codes, 3.4167 as stored", "objective:", "gap:", "3 bits: #"):
        assert part in out
    convert = ("convert", tiny_model("qwen2_moe"))
    assert alphaq(*convert, tmp_path / "map", "--bit-map", bit_map)[0] == 0
    assert alphaq(*convert, tmp_path / "bits", "--bits", "3.3", "--stats", stats)[0] == 0
    assert alphaq(*convert, tmp_path / "measured", "--bits", "3.3")[0] == 0
    maps = [config_bits(tmp_path / name) for name in ("map", "bits", "measured")]
    assert maps == [read_bit_map(bit_map)] * 3


@pytest.mark.parametrize(
    "options",
    [
        ("--bits", "2.5", "--gamma", "4", "--noise", "analytic", "--candidate-bits", "1,2,3"),
        ("--bits", "2.5", "--granularity", "expert"),
        ("--mode", "random", "--seed", "3"),
        ("--mode", "uniform", "--bits", "2.5"),
        ("--mode", "ratio", "--shares", "0.5,0.25"),
    ],
)
def test_allocate_and_convert_choose_alike(alphaq, tiny_model, stats, tmp_path, options):
    assert alphaq("allocate", stats, *options, "-o", tmp_path / "map.json")[0] == 0
    status, _, _ = alphaq("convert", tiny_model("qwen2_moe"), tmp_path / "out", "--stats", stats, *options)
    assert status == 0
    bits = config_bits(tmp_path / "out")
    assert bits == read_bit_map(tmp_path / "map.json")
    assert len(set(bits.values())) > 1


def test_allocate_prints_json(alphaq, stats, tmp_path):
    status, out, _ = alphaq("allocate", stats, "--json", "-o", tmp_path / "map.json")
    result = json.loads(out)
    assert status == 0
    assert result["bits"] == 3.5
    assert result["stored_bits"] == 3.625
    assert result["matrices"] == sum(result["widths"].values()) == 24
    assert 0 <= result["gap"] < 1e-3
    assert result["objective"] > 0


@pytest.mark.parametrize("option", ["--target-size", "--fit-memory"])
def test_sizes_are_kept_and_nearly_filled(alphaq, tiny_model, stats, tmp_path, option):
    limit = 770_000
    options = (option, str(limit), *(("--reserve", "30000") if option == "--fit-memory" else ()))
    status, printed, _ = alphaq("convert", tiny_model("qwen2_moe"), tmp_path / "out", *options, "--stats", stats)
    assert status == 0
    files = files_of(tmp_path / "out")
    used, limit = sum(files.values()), limit
    if option == "--fit-memory":
        tensors = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors").values()
        used, limit = sum(tensor.nbytes for tensor in tensors), limit - 30_000
        assert "30.0 KB reserved for KV cache, activations and vLLM itself" in printed
    # A step of one matrix is 2 KB, and some bytes of headers.
    assert limit - 2500 < used <= limit
    status, out, _ = alphaq("allocate", stats, *options, "-o", tmp_path / "map.json")
    assert status == 0
    assert ("30.0 KB reserved for KV cache" if option == "--fit-memory" else "770.0 KB for all files") in out
    status, out, _ = alphaq("allocate", stats, *options, "--json", "-o", tmp_path / "map.json")
    predicted = json.loads(out)["size" if option == "--target-size" else "memory"]
    assert limit - 6000 < predicted <= limit
    assert alphaq("convert", tiny_model("qwen2_moe"), tmp_path / "two", "--bit-map", tmp_path / "map.json")[0] == 0
    assert sum(files_of(tmp_path / "two").values()) <= 770_000


def test_a_generous_size_gives_the_greatest_width(alphaq, stats, tmp_path):
    assert alphaq("allocate", stats, "--target-size", "1GB", "-o", tmp_path / "map.json")[0] == 0
    assert set(read_bit_map(tmp_path / "map.json").values()) == {4}


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        (("--target-size", "1GB", "--candidate-bits", "4,8", "--noise", "analytic"), {8}),
        (("--mode", "ratio", "--candidate-bits", "4,6,8", "--shares", "0.5,0.5"), {4, 8}),
    ],
)
def test_candidates_need_not_span_the_default_average(alphaq, stats, tmp_path, options, widths):
    assert alphaq("allocate", stats, *options, "-o", tmp_path / "map.json")[0] == 0
    assert set(read_bit_map(tmp_path / "map.json").values()) == widths


def test_a_size_out_of_reach_is_refused_before_measuring(alphaq, tiny_model, stats, tmp_path):
    arguments = ("convert", tiny_model("qwen2_moe"), tmp_path / "out", "--target-size", "300KB")
    for given in (arguments, ("allocate", stats, "--target-size", "300KB", "-o", tmp_path / "map.json")):
        status, _, error = alphaq(*given)
        assert status == 2
        assert "--target-size: expected room for at least" in error
        assert "measure:" not in error
    assert not (tmp_path / "map.json").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard_size", ["4GiB", "50KB"])
@pytest.mark.parametrize(
    "options", [("--bits", "3.3"), ("--mode", "uniform", "--bits", "2.25"), ("--target-size", "800KB")]
)
def test_dry_run_predicts_every_byte_and_writes_none(alphaq, model, stats, tmp_path, options, shard_size):
    (model / "tokenizer.json").write_text('{"ü": 1}')
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Model\n")
    source = tmp_path / "sources"
    source.mkdir()
    arguments = ("convert", model, source / "out", *options, "--stats", stats, "--max-shard-size", shard_size, "--json")
    status, out, _ = alphaq(*arguments, "--dry-run")
    assert status == 0
    predicted = json.loads(out)
    assert predicted["dry_run"]
    assert not list(source.iterdir())
    status, out, _ = alphaq(*arguments)
    assert status == 0
    actual = json.loads(out)
    # Experts without tokens only show when the model runs.
    for changing in ("seconds", "phases", "expected", "dry_run", "starved"):
        predicted.pop(changing), actual.pop(changing)
    assert predicted == actual
    files = files_of(source / "out")
    assert actual["total_size"] == sum(files.values())
    assert actual["size_after"] == sum(size for name, size in files.items() if name.endswith(".safetensors"))


def test_dry_run_says_what_would_happen(alphaq, tiny_model, tmp_path):
    status, out, _ = alphaq("convert", tiny_model("qwen2_moe"), tmp_path / "out", "--dry-run", "--mode", "uniform")
    assert status == 0
    for part in ("3.5000 by codes", "4 bits: #", "all files:", " bytes", "seconds:        about", "this was a dry run"):
        assert part in out
    assert "serve with" not in out


def test_convert_refuses_stale_statistics(alphaq, model, stats, tmp_path):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"] *= 1.5
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    status, _, error = alphaq("convert", model, tmp_path / "out", "--stats", stats)
    assert status == 2
    assert f"{stats}: these statistics are out of date: fingerprint" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--group-size", "128"), "out of date: group_size: expected 128, got 64"),
        (("--candidate-bits", "2,3,8"), "got none at 8: measure again with --candidate-bits, or use --noise analytic"),
    ],
)
def test_convert_refuses_statistics_of_other_settings(alphaq, tiny_model, stats, tmp_path, options, message):
    status, _, error = alphaq("convert", tiny_model("qwen2_moe"), tmp_path / "out", "--stats", stats, *options)
    assert status == 2
    assert message in error
    assert not (tmp_path / "out").exists()


def test_the_statistics_in_the_output_serve_the_next_conversion(alphaq, tiny_model, stats, tmp_path):
    source = tiny_model("qwen2_moe")
    assert alphaq("convert", source, tmp_path / "one", "--stats", stats)[0] == 0
    assert (tmp_path / "one" / "alphaq_stats.csv").read_bytes() == stats.read_bytes()
    arguments = ("convert", source, tmp_path / "two", "--bits", "2.2", "--stats", tmp_path / "one" / "alphaq_stats.csv")
    status, _, error = alphaq(*arguments)
    assert status == 0
    assert "measure:" not in error


@pytest.mark.parametrize("options", [("--mode", "uniform"), ("--bit-map", "map.json")])
def test_given_statistics_go_with_a_checkpoint_that_does_not_need_them(
    alphaq, tiny_model, stats, tmp_path, options, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "map.json").write_text(json.dumps({m.name: 3 for m in read_statistics(stats).matrices}))
    source = tiny_model("qwen2_moe")
    assert alphaq("convert", source, tmp_path / "out", "--stats", stats, *options)[0] == 0
    assert (tmp_path / "out" / "alphaq_stats.csv").read_bytes() == stats.read_bytes()
    assert alphaq("convert", tiny_model("mixtral"), tmp_path / "no", "--stats", stats, "--mode", "uniform")[0] == 2


def test_overrides_and_exclusions_reach_the_checkpoint(alphaq, tiny_model, stats, tmp_path):
    source, out = tiny_model("qwen2_moe"), tmp_path / "out"
    options = (
        "--exclude",
        "*.layers.0.*",
        "--override",
        "*.experts.1.*=8",
        "--bits",
        "3.5",
        "--candidate-bits",
        "2,3,4",
    )
    assert alphaq("convert", source, out, *options, "--stats", stats)[0] == 0
    bits = config_bits(out)
    assert all(name.startswith("model.layers.1.") for name in bits)
    assert {width for name, width in bits.items() if ".experts.1." in name} == {8}
    assert 3.4 < sum(bits.values()) / 12 <= 3.5
    tensors = load_file(out / "model-00001-of-00001.safetensors")
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    assert tensors[name].equal(load_file(source / "model.safetensors")[name])
    assert len(read_statistics(out / "alphaq_stats.csv").matrices) == 12
    status, _, _ = alphaq("validate", out, "--source", source)
    assert status == 0


BAD = {
    "manual without a map": (("--mode", "manual"), "--mode manual: expected a bit map"),
    "a map in another mode": (
        ("--mode", "random", "--bit-map", "m.json"),
        "--mode random: expected no bit map, which only --mode manual takes",
    ),
    "an override with a map": (("--bit-map", "MAP", "--override", "*=4"), "--override: expected a budget"),
    "bits in ratio": (("--mode", "ratio", "--bits", "3"), "--mode ratio: .* got also --bits"),
    "a size in ratio": (("--mode", "ratio", "--target-size", "1GB"), "--mode ratio: .* got also --target-size"),
    "gamma in uniform": (("--mode", "uniform", "--gamma", "3"), "--mode uniform: .* got also --gamma"),
    "a seed in alphaq": (("--seed", "3"), "--mode alphaq: .* got also --seed"),
    "shares of no sense": (("--mode", "ratio", "--shares", "0.9,0.9"), "--shares: .* at most 1"),
    "one share": (("--mode", "ratio", "--shares", "0.9"), "expected two shares such as 0.25,0.25, got '0.9'"),
    "reserve without memory": (("--reserve", "1GB"), "--reserve: expected together with --fit-memory"),
    "reserve of all memory": (("--fit-memory", "1GB", "--reserve", "1GB"), "--reserve: expected less than the memory"),
    "two budgets": (("--bits", "3", "--target-size", "1GB"), "not allowed with argument"),
    "an override of nothing": (("--override", "*.layers.9.*=4"), "--override: .* matches none"),
    "an override to 9": (("--override", "*=9"), r"expected PATTERN=BITS .* got '\*=9'"),
    "overrides that conflict": (("--override", "*=4", "--override", "*.0.*=3"), "--override: expected one width for"),
    "an exclusion of nothing": (("--exclude", "lm_head"), "--exclude: .* got 'lm_head', which matches none"),
    "part of a module": (("--exclude", "*.experts.0.*"), "--exclude: expected whole modules of experts"),
    "everything": (("--exclude", "*"), "--exclude: expected to leave some experts"),
    "overrides that take all": (("--override", "*.layers.0.*=8"), "--override: expected to leave the other matrices"),
    "tp size that cannot split": (("--tp-size", "3"), "intermediate_size=128 over --tp-size 3 ranks is 42.6667 each"),
    "tp size that cuts all groups": (("--tp-size", "8"), r"is 16 each, .* divisible by 32: choose one of \[1, 2, 4\]"),
    "tp size zero": (("--tp-size", "0"), "--tp-size: expected a number of ranks from 1 up, got 0"),
    "statistics that are not there": (("--stats", "none.csv"), r"make it with python -m offline\.measure"),
}


@pytest.mark.parametrize("case", BAD)
def test_convert_refuses_before_anything_is_done(alphaq, tiny_model, tmp_path, case):
    options, message = BAD[case]
    source = tiny_model("qwen2_moe")
    if "MAP" in options:
        names = [n.removesuffix(".weight") for n in load_file(source / "model.safetensors") if ".experts." in n]
        (tmp_path / "map.json").write_text(json.dumps(dict.fromkeys(names, 4)))
        options = tuple(tmp_path / "map.json" if option == "MAP" else option for option in options)
    status, _, error = alphaq("convert", source, tmp_path / "out", *options)
    assert status == 2
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)
    assert "measure:" not in error
    assert not [path for path in tmp_path.iterdir() if path.name != "map.json"]


def test_tp_size_that_splits_is_accepted(alphaq, tiny_model, tmp_path):
    # Four ranks share one group of 128 columns.
    options = ("--tp-size", "4", "--linear-bits", "8", "--mode", "uniform", "--dry-run")
    assert alphaq("convert", tiny_model("qwen2_moe"), tmp_path / "out", *options)[0] == 0
