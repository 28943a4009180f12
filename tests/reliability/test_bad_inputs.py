"""The table of bad inputs is complete, and names tests that exist."""

import re
import subprocess
import sys

from tests.reliability.bad_inputs import CASES, COUNT, TABLE, numbers_by_test, rows

COLLECT = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=--import-mode=importlib"]


def collected(rootdir, *arguments):
    result = subprocess.run([*COLLECT, *arguments], cwd=rootdir, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
    return {line for line in result.stdout.splitlines() if "::" in line}


def test_every_number_has_a_test():
    table = rows()
    assert list(table) == list(range(1, COUNT + 1))
    assert all(table.values())
    assert TABLE.read_text().count("::") == sum(map(len, table.values())), "a test that the table's pattern misses"


def test_every_test_exists_and_carries_its_number(pytestconfig):
    numbers = numbers_by_test()
    files = sorted({test.split("::")[0] for test in numbers})
    marked = collected(pytestconfig.rootpath, "-m", "bad_input", *files)
    named = {name for test in marked for name in (test, test.split("[")[0])}
    assert not numbers.keys() - named


def test_a_number_selects_its_tests(pytestconfig):
    file = "tests/offline/source/test_checkpoint.py"
    assert collected(pytestconfig.rootpath, "-m", "bad_input(number=3)", file) == {
        test for test in rows()[3] if test.startswith(file)
    }


def test_the_documents_count_the_rows(pytestconfig):
    assert f"has {COUNT} bad inputs" in (pytestconfig.rootpath / "docs" / "reliability.md").read_text()


def test_every_case_has_a_test_that_names_it():
    """Rows say which case they are of, and name a test that says so too."""
    shown = set()
    for row, tests in re.findall(r"^\| \d+ \| (case \d+: .+?) \| .+ \| (.+) \|$", TABLE.read_text(), re.MULTILINE):
        case = int(re.findall(r"\d+", row)[0])
        assert any(case in cases_of(test) for test in re.findall(r"`([^`]+)`", tests)), row
        shown.add(case)
    assert shown == CASES


def cases_of(test):
    """The numbers in a test's name: those after ``test_case_`` or ``test_cases_``."""
    numbers = re.search(r"::test_cases?_((?:\d+_(?:and_)?)+)", test)
    return {int(number) for number in re.findall(r"\d+", numbers[1])} if numbers else set()
