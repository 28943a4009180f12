"""Commands for users without a home, and with directories of any name."""

import os
import shlex
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from alphaq_vllm import convert
from offline.writing import output
from tests.reliability.surroundings import home_is_a_file, no_home

QUICK = ("--bits", "3", "--noise", "analytic", "--quantizer", "mse")


@pytest.mark.parametrize("place", [no_home, home_is_a_file])
@pytest.mark.parametrize("cache", ["a cache", "no cache"])
def test_case_8_commands_need_no_home(speaking_model, alphaq, monkeypatch, tmp_path, place, cache):
    """Also by default, when the model is run."""
    place(monkeypatch, tmp_path)
    if cache == "a cache":
        monkeypatch.setenv("ALPHAQ_CACHE", str(tmp_path / "cache"))
    source, out, stats = speaking_model("qwen2_moe"), tmp_path / "out", tmp_path / "stats.csv"
    for command in (
        ("plan", source),
        ("measure", source, "-o", stats, "--noise", "analytic"),
        ("convert", source, out, "--stats", stats, "--noise", "analytic"),
        ("convert", source, tmp_path / "default", "--dry-run"),
        ("inspect", out),
        ("validate", out, "--source", source),
        ("dequantize", out, tmp_path / "plain"),
    ):
        status, _, error = alphaq(*command)
        assert status == 0, (command, error)


@pytest.mark.parametrize("name", ["a b", "q's\"d", "$HOME", "a;b", "-x", "~", "ü", "a*b?", "a\\b", "[", "a\nb"])
def test_case_13_the_printed_command_names_the_directory(tiny_model, alphaq, tmp_path, name):
    """As the shell reads it; that vLLM opens these is shown by ``tests/reliability/test_loading.py``."""
    status, printed, error = alphaq("convert", tiny_model("qwen2_moe"), tmp_path / name, *QUICK)
    assert status == 0, error
    command = shlex.split(printed.partition("serve with:")[2])
    assert command == ["vllm", "serve", str(tmp_path / name), "--quantization", "alphaq"]
    assert Path(command[2], "config.json").is_file()


@pytest.mark.parametrize(("encoding", "name"), [("ascii", "ü"), ("utf-8", os.fsdecode(b"\xff"))])
def test_case_13_a_name_that_the_terminal_cannot_show_fails_no_command(
    tiny_model, alphaq, monkeypatch, tmp_path, encoding, name
):
    terminal = TextIOWrapper(BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    status, _, error = alphaq("convert", tiny_model("qwen2_moe"), tmp_path / name, *QUICK)
    assert status == 0, error
    terminal.flush()
    shown = name.encode(encoding, errors="backslashreplace")
    assert b"written:        " + os.fsencode(tmp_path) + b"/" + shown in terminal.buffer.getvalue()


@pytest.mark.parametrize("name", ["out[1]", "[ab]/out", "[!a]"])
@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_case_13_a_directory_that_vllm_would_not_open_is_refused(tiny_model, alphaq, tmp_path, name, options):
    status, _, error = alphaq("convert", tiny_model("qwen2_moe"), tmp_path / name, *QUICK, *options)
    assert (status, error.count("\n")) == (2, 1)
    assert f"error: {tmp_path / name}: expected a path that is not a pattern" in error
    assert "got one that means another: choose one without * ? [ ]" in error
    assert not list(tmp_path.iterdir())


def test_case_13_a_dequantized_model_that_vllm_would_not_open_is_refused(tiny_model, alphaq, tmp_path):
    convert(tiny_model("qwen2_moe"), tmp_path / "out", bits=3, noise="analytic", quantizer="mse")
    status, _, error = alphaq("dequantize", tmp_path / "out", tmp_path / "plain[1]")
    assert (status, error.count("\n")) == (2, 1)
    assert f"error: {tmp_path / 'plain[1]'}: expected a path that is not a pattern" in error
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_case_13_a_directory_that_means_others_too_is_refused(tiny_model, alphaq, tmp_path):
    (tmp_path / "run-1").mkdir()
    status, _, error = alphaq("convert", tiny_model("qwen2_moe"), tmp_path / "run-*", *QUICK)
    assert (status, f"got one that means {tmp_path / 'run-1'}: choose" in error) == (2, True)


@pytest.mark.parametrize("name", ["n" * 250, "n" * 255, "模" * 85])
def test_case_15_a_directory_may_have_the_longest_name(tiny_model, alphaq, tmp_path, name):
    source, out, plain = tiny_model("qwen2_moe"), tmp_path / name, tmp_path / "plain" / name
    for command in (
        ("convert", source, out, *QUICK),
        ("inspect", out),
        ("validate", out, "--source", source),
        ("dequantize", out, plain),
        ("convert", plain, tmp_path / "again", *QUICK),
    ):
        status, _, error = alphaq(*command)
        assert status == 0, (command[0], error)
    assert {path.name for path in tmp_path.iterdir()} == {name, "plain", "again"}


@pytest.mark.parametrize("name", ["n" * 256, "模" * 86, f"{'n' * 300}/out"])
@pytest.mark.parametrize("command", ["convert", "dry run"])
def test_case_15_a_name_that_is_too_long_is_refused_with_the_limit(tiny_model, alphaq, tmp_path, name, command):
    options = ("--dry-run",) if command == "dry run" else ()
    status, _, error = alphaq("convert", tiny_model("qwen2_moe"), tmp_path / name, *QUICK, *options)
    longest = len(os.fsencode(name.removesuffix("/out")))
    assert status == 2
    assert f": expected names of at most 255 bytes, got one of {longest}: choose a shorter one\n" in error
    assert not list(tmp_path.iterdir())


def test_case_15_a_path_that_is_too_long_is_refused_with_the_limit(tiny_model, alphaq, tmp_path):
    out = tmp_path.joinpath(*["n" * 250] * 13)
    status, _, error = alphaq("convert", tiny_model("qwen2_moe"), out, *QUICK)
    limit = output.PATH_LIMIT
    assert (status, f"expected a path of at most {limit} bytes, got {len(str(out))}: choose" in error) == (2, True)


@pytest.mark.parametrize("command", ["plan", "measure", "inspect", "validate"])
def test_case_15_every_command_names_the_limit(alphaq, tmp_path, command):
    options = ("-o", tmp_path / "stats.csv") if command == "measure" else ()
    status, _, error = alphaq(command, tmp_path / ("n" * 256), *options)
    assert (status, error.count("\n")) == (2, 1)
    assert error.endswith("choose a name of at most 255 bytes\n")
