"""How commands end, and what they print on the way."""

import pytest

from offline.cli import Parser, run
from offline.operations.summary import histogram
from offline.progress import format_bytes, parse_bytes


def raiser(error):
    def command(arguments):
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        (raiser(ValueError("bits: bad")), 2, "error: bits: bad\n"),
        (raiser(OSError(28, "No space left on device", "f")), 2, "error: [Errno 28] No space left on device: 'f'\n"),
        (raiser(KeyboardInterrupt()), 130, "error: interrupted\n"),
        (raiser(KeyboardInterrupt("interrupted: resume")), 130, "error: interrupted: resume\n"),
        (lambda arguments: None, 0, ""),
    ],
)
def test_run_turns_errors_into_a_line_and_a_status(capsys, command, status, message):
    with pytest.raises(SystemExit) as caught:
        run(command)
    assert caught.value.code == status
    assert capsys.readouterr().err == message


def test_run_shows_a_bug_as_a_bug():
    with pytest.raises(KeyError):
        run(raiser(KeyError("bug")))


def test_parser_raises_and_points_to_its_help():
    with pytest.raises(ValueError, match=r"unrecognized arguments: --x \(see python -m offline\.name --help\)"):
        Parser("name", "summary", "  example").parse_args(["--x"])


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (999_960, "1.0 MB"), (2.5e12, "2500.0 GB")]
)
def test_format_bytes(number, text):
    assert format_bytes(number) == text


@pytest.mark.parametrize(
    ("text", "number"), [("4GiB", 2**32), ("1.5 MB", 1_500_000), ("1024", 1024), ("2kib", 2048), ("7 GB", 7 * 10**9)]
)
def test_parse_bytes(text, number):
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "0", "-1GB", "4 parsecs", "GiB", "1e9", "nan"])
def test_parse_bytes_refuses_what_is_not_a_size(text):
    with pytest.raises(ValueError, match="expected a size such as"):
        parse_bytes(text)


def test_histogram_draws_shares():
    assert histogram({2: 1, 8: 3}) == [
        "  2 bits: ##########                               1 (25 %)",
        "  8 bits: ##############################           3 (75 %)",
    ]
