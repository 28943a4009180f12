"""The table of bad inputs, read from ``bad_inputs.md``."""

import re
from pathlib import Path

TABLE = Path(__file__).with_name("bad_inputs.md")
COUNT = 71
# Numbers of a list of what was reported of programs of this kind.
CASES = set(range(1, 17))


def rows():
    """The tests of each row, as pytest names them; one without brackets stands for all its cases."""
    found = re.findall(r"^\| (\d+) \| .+ \| .+ \| (.+) \|$", TABLE.read_text(), re.MULTILINE)
    return {int(number): re.findall(r"`([^`]+)`", tests) for number, tests in found}


def numbers_by_test():
    """The same the other way round."""
    numbers = {}
    for number, tests in rows().items():
        for test in tests:
            numbers.setdefault(test, []).append(number)
    return numbers
