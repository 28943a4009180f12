"""The list of every failure: of kinds that the commands turn into a line, and in the form that they share."""

import re

from tests.reliability.messages import ROOT, failures

KINDS = {
    "ValueError", "TypeError", "FileNotFoundError", "OSError", "ImportError", "AttributeError", "ModuleNotFoundError",
    "MemoryError",
}  # fmt: skip
# They put a failure of another kind into words.
TRANSLATORS = {"_death", "_resumable"}


def is_in_form(failure):
    """Of a known kind, one line, and about a name, an option or a value."""
    return (
        failure.kind in KINDS | TRANSLATORS
        and "\n" not in failure.message
        and not failure.message.endswith((".", "!"))
        and len(failure.message) < 500
        and re.search(r"\{.+\}|`[a-z_]+`|--[a-z]|^[A-Za-z_, ]+:", failure.message)
    )


def test_failures_are_of_known_kinds_and_say_what_they_are_about():
    assert [failure for failure in failures() if not is_in_form(failure)] == []


def test_most_failures_say_what_was_expected_and_what_came():
    found = failures()
    both = [failure for failure in found if "expected" in failure.message and "got" in failure.message]
    assert len(found) > 200
    assert len(both) > 0.75 * len(found)


def test_failures_are_of_every_room():
    files = {failure.file for failure in failures()}
    raising = {
        path.relative_to(ROOT)
        for room in ("alphaq_vllm", "offline")
        for path in (ROOT / room).rglob("*.py")
        if re.search(r"^\s+raise \w+(\.\w+)*\(", path.read_text(), re.MULTILINE)
    }
    assert raising == files
