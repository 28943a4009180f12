"""The table of bad inputs is complete, and names tests that exist."""

import subprocess
import sys

from tests.reliability.bad_inputs import COUNT, TABLE, numbers_by_test, rows

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
