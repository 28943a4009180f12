"""Options: the same object from the command line, from --hf-overrides and in Python, and what it refuses."""

import dataclasses
import inspect
import json

import pytest

import alphaq_vllm
from offline.allocation.widths import Budget
from offline.cli import given, spelled
from offline.convert import build_parser
from offline.model.text import Calibration
from offline.operations.options import ConvertOptions, MeasureOptions, options_from
from offline.operations.width_options import WidthOptions

# Every field, as a command line gives it, in Python, and in JSON.
EVERY = {
    "bits": ("3", 3.0),
    "mode": ("random", "random"),
    "candidate_bits": ("2,3,8", [8, 2, 3]),
    "granularity": ("expert", "expert"),
    "seed": ("5", 5),
    "exclude": ("*.layers.0.*", ["*.layers.0.*"]),
    "override": ("*.1.up_proj=8", {"*.1.up_proj": 8}),
    "effort": ("2", 2),
    "quantizer": ("gptq", "gptq"),
    "calibration": ("text.txt", ["text.txt"]),
    "calibration_tokens": ("64", 64),
    "calibration_length": ("32", 32),
    "group_size": ("64", 64),
    "linear_bits": ("8", 8),
    "head_bits": ("4", 4),
    "tp_size": ("2", 2),
    "max_shard_size": ("2GiB", 2**31),
    "workers": ("3", 3),
}


def meaning(options):
    """What an operation reads of options."""
    plain = {
        name: getattr(options, name)
        for name in ("stats", "quantizer", "group_size", "linear_bits", "head_bits", "tp_size")
    }
    read = options.widths(), options.room(), options.selection(), options.text(), options.shard_bytes()
    return plain, read, (options.effort, options.dry_run, options.resume, options.workers)


def parsed(*arguments):
    return ConvertOptions(**given(build_parser().parse_args(["MODEL", "OUT", *arguments]), "model", "out"))


def test_command_line_and_python_mean_the_same():
    arguments = [part for name, (text, _) in EVERY.items() for part in (f"--{name.replace('_', '-')}", text)]
    in_python = ConvertOptions(**{name: value for name, (_, value) in EVERY.items()})
    assert meaning(parsed(*arguments)) == meaning(in_python)
    assert meaning(options_from(json.loads(json.dumps({n: v for n, (_, v) in EVERY.items()})), list(EVERY))) == meaning(
        in_python
    )
    assert meaning(parsed()) == meaning(ConvertOptions())


def test_command_line_has_every_field_and_no_defaults_of_its_own():
    args = build_parser().parse_args(["MODEL", "OUT"])
    assert given(args, "model", "out") == {}
    options = {action.dest for action in build_parser()._actions}
    assert options - {"help", "model", "out", "json"} == {field.name for field in dataclasses.fields(ConvertOptions)}


@pytest.mark.parametrize(
    ("function", "options"), [("convert", ConvertOptions), ("measure", MeasureOptions), ("allocate", WidthOptions)]
)
def test_functions_take_the_fields_with_their_defaults(function, options):
    parameters = list(inspect.signature(getattr(alphaq_vllm, function)).parameters.values())[2:]
    fields = dataclasses.fields(options)
    assert [(p.name, p.default, p.kind) for p in parameters] == [
        (field.name, field.default, inspect.Parameter.KEYWORD_ONLY) for field in fields
    ]
    documented = "".join(base.__doc__ or "" for base in options.__mro__)
    assert all(f"        {field.name}: " in documented for field in fields)


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ConvertOptions().bits = 3


@pytest.mark.parametrize(
    ("fields", "budget"),
    [
        ({}, Budget(noise="expert")),
        ({"bits": "2.5", "gamma": "auto"}, Budget(2.5, noise="expert")),
        ({"noise": "measured"}, Budget()),
        ({"candidate_bits": "4,2,3,3", "gamma": 2}, Budget(gamma=2.0, noise="expert")),
        ({"preset": "paper", "bits": 3}, Budget(3.0, noise="analytic")),
        ({"mode": "ratio", "shares": "0.5,0.25"}, Budget(4.0, mode="ratio", shares=(0.5, 0.25))),
        ({"target_size": "1GB", "candidate_bits": 5}, Budget(5.0, (5,), noise="expert")),
        ({"mode": "random", "seed": "7"}, Budget(mode="random", seed=7)),
    ],
)
def test_budget(fields, budget):
    assert ConvertOptions(**fields).widths() == budget


def test_what_errors_do_decides_where_it_can_be_had_unless_something_else_is_named():
    assert ConvertOptions().widths(propagates=True) == Budget(noise="propagated")
    assert ConvertOptions(noise="analytic").widths(propagates=True) == Budget(noise="analytic")
    assert ConvertOptions(mode="uniform").widths(propagates=True) == Budget(mode="uniform")
    paper = Budget(mode="alphaq", gamma=None, noise="analytic", granularity="projection")
    assert ConvertOptions(preset="paper").widths(propagates=True) == paper
    assert MeasureOptions().budget(propagates=True).noise == "propagated"
    assert MeasureOptions().budget().noise == "expert"


def test_rooms_selection_and_text(tmp_path):
    assert ConvertOptions(target_size="1KB").room().limit == 1000
    room = ConvertOptions(fit_memory=10**10, reserve="1GB").room()
    assert (room.limit, room.reserve) == (9 * 10**9, 10**9)
    assert ConvertOptions(override=["a=b=3"]).selection().overrides == (("a=b", 3),)
    assert ConvertOptions(exclude="x").selection().exclude == ("x",)
    assert ConvertOptions().text() is None
    assert ConvertOptions(calibration=tmp_path / "a").text() == Calibration((tmp_path / "a",))
    (tmp_path / "map.json").write_text('{"a": 3}')
    assert ConvertOptions(bit_map=tmp_path / "map.json", mode="manual").widths() == {"a": 3}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": "many"}, "`bits`: expected a number of bits, got 'many'"),
        ({"bits": True}, "`bits`: expected a number of bits, got True"),
        ({"bits": 9}, "`bits`: expected an average from 2 to 4"),
        ({"seed": 1.5, "mode": "random"}, "`seed`: expected a whole number, got 1.5"),
        ({"candidate_bits": "2,x"}, "`candidate_bits`: expected widths such as 2,3,4, got '2,x'"),
        ({"candidate_bits": [2, None]}, "`candidate_bits`: expected widths such as 2,3,4"),
        ({"gamma": "high"}, "`gamma`: expected auto or a number, got 'high'"),
        ({"shares": "1", "mode": "ratio"}, "`shares`: expected two shares such as 0.25,0.25, got '1'"),
        ({"target_size": "big"}, "`target_size`: expected a size such as 4GiB or 500MB, got 'big'"),
        ({"max_shard_size": 0}, "`max_shard_size`: expected a size such as"),
        ({"memory": "much"}, "`memory`: expected a size such as 4GiB or 500MB, got 'much'"),
        ({"mtp_bits": 9}, "`mtp_bits`: expected one of 1 to 8 or 16, got 9"),
        ({"bits": 3, "fit_memory": "1GB"}, "`bits`, `fit_memory`: expected one of these, got 2"),
        ({"reserve": "1GB"}, "`reserve`: expected together with `fit_memory`"),
        ({"mode": "best"}, "`mode`: expected one of alphaq, uniform, ratio, random, got 'best'"),
        ({"mode": "manual"}, "`mode=manual`: expected a bit map, got none: see `bit_map`"),
        ({"mode": "uniform", "bit_map": {"a": 3}}, "`mode=uniform`: expected no bit map"),
        ({"bit_map": {"a": 3}, "seed": 1}, "`bit_map`: expected to be the only choice of widths, got also `seed`"),
        ({"bit_map": {"a": 9}}, "`bit_map`: a: expected one of the widths"),
        ({"bit_map": {"a": 3.0}}, "`bit_map`: a: expected one of the widths"),
        ({"mode": "uniform", "gamma": 3}, "`mode=uniform`: expected only options that it uses, got also `gamma`"),
        ({"seed": 1}, "`mode=alphaq`: expected only options that it uses, got also `seed`"),
        ({"preset": "best"}, "`preset`: expected one of paper, got 'best'"),
        (
            {"preset": "paper", "gamma": 2},
            "`preset=paper`: expected to set `mode`, `gamma`, `noise`, `granularity`, got",
        ),
        ({"preset": "paper", "mode": "alphaq"}, "`preset=paper`: expected to set `mode`"),
        (
            {"preset": "paper", "bit_map": {"a": 3}},
            "`bit_map`: expected to be the only choice of widths, got also",
        ),
        ({"override": ["*"]}, "`override`: expected PATTERN=BITS with bits out of"),
        ({"override": {"*": 9}}, "`override`: expected PATTERN=BITS with bits out of"),
        ({"effort": 3}, "`effort`: expected one of 0, 1, 2, got 3"),
        ({"quantizer": "best"}, "`quantizer`: expected one of mse, rtn, hqq, gptq, got 'best'"),
        ({"quantizer": "mse", "calibration": "x"}, "`calibration`: expected `quantizer=gptq`, got mse"),
        ({"linear_bits": 5}, "`linear_bits`: expected one of 16, 8, 4, got 5"),
        ({"head_bits": 3}, "`head_bits`: expected one of 16, 8, 4, got 3"),
        ({"calibration_length": 0}, "`calibration_length`: expected a number of tokens from 1 up"),
    ],
)
def test_options_refuse(fields, message):
    with pytest.raises(ValueError) as caught:
        ConvertOptions(**fields)
    assert str(caught.value).startswith(message)


def test_what_is_measured_is_checked():
    with pytest.raises(ValueError, match="`quantizer`: expected one of mse, rtn, hqq, got 'gptq'"):
        MeasureOptions(quantizer="gptq")
    with pytest.raises(ValueError, match="`candidate_bits`: expected ascending widths"):
        MeasureOptions(candidate_bits=(9,))
    assert MeasureOptions(candidate_bits="2,8", noise="propagated").budget().measured_widths == (2, 8)


def test_settings_of_another_program_are_refused_by_name():
    with pytest.raises(ValueError, match="got workers, which only a conversion takes: leave them out"):
        options_from({"workers": 2}, ["bits"])
    with pytest.raises(ValueError, match="expected settings out of bits, got bit: leave them out"):
        options_from({"bit": 2}, ["bits"])


def test_command_line_writes_its_own_spelling():
    message = "`mode=ratio`: lower `candidate_bits`, or `noise=measured`, not `x.json`"
    assert spelled(message) == "--mode ratio: lower --candidate-bits, or --noise measured, not `x.json`"
