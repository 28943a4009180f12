"""Work spread over processes: the same results, and every failure is seen."""

import operator
import os
import pickle
import signal
import subprocess
import time

import pytest

from offline.parallel import TASKS_IN_FLIGHT, _dumps, _loads, run_all


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_run_all_yields_every_item_with_its_result(workers):
    results = list(run_all(operator.neg, range(20), workers))
    assert sorted(results) == [(i, -i) for i in range(20)]


@pytest.mark.timeout(120)
def test_items_and_results_may_be_larger_than_any_buffer():
    items = [bytes(2**25) for _ in range(6)]
    assert sum(result == item for item, result in run_all(bytes.upper, items, 2)) == len(items)


def test_run_all_accepts_no_items():
    assert list(run_all(operator.neg, [], 2)) == []


def test_run_all_runs_at_the_same_time(tmp_path):
    """Commands of which the first waits for another to begin."""
    script = f"touch {tmp_path}/$0; until [ $(ls {tmp_path} | wc -l) -ge 2 ]; do sleep 0.01; done"
    results = run_all(subprocess.call, [["timeout", "120", "sh", "-c", script, str(i)] for i in range(4)], 2)
    assert [status for _, status in results] == [0] * 4


@pytest.mark.parametrize("workers", [1, 2])
def test_run_all_draws_items_as_they_are_needed(workers):
    drawn = []
    items = (drawn.append(i) or i for i in range(100))
    results = run_all(operator.neg, items, workers)
    next(results)
    assert len(drawn) <= workers * TASKS_IN_FLIGHT + 1


@pytest.mark.parametrize("workers", [1, 2])
def test_run_all_raises_what_the_function_raises(workers):
    with pytest.raises(ValueError, match=r"invalid literal.*'x'"):
        list(run_all(int, ["1", "x", "2"], workers))
    with pytest.raises(FileNotFoundError) as caught:
        list(run_all(os.stat, ["/nowhere"], workers))
    assert caught.value.filename == "/nowhere"


@pytest.mark.parametrize(
    ("function", "item", "message"),
    [
        (os._exit, 3, "a worker process ended with exit status 3"),
        (
            signal.raise_signal,
            signal.SIGKILL,
            "was killed by SIGKILL, as happens when memory runs out: set `workers` lower",
        ),
        (signal.raise_signal, signal.SIGSEGV, "was killed by SIGSEGV$"),
    ],
)
def test_run_all_reports_a_process_that_dies(function, item, message):
    with pytest.raises(ChildProcessError, match=message):
        list(run_all(function, [item] * 4, 2))


def test_run_all_leaves_no_process(capfd):
    results = run_all(time.sleep, [0, 3600, 3600], 2)
    next(results)
    results.close()
    assert capfd.readouterr().err == ""


def test_dumps_leaves_out_the_shared_object():
    shared = list(range(10_000))
    content = _dumps({"a": shared, "b": [shared, 5]}, shared)
    assert len(content) < 200
    twin = pickle.loads(pickle.dumps(shared))
    loaded = _loads(content, twin)
    assert loaded["a"] is loaded["b"][0] is twin
    assert loaded["b"][1] == 5


def test_run_all_sends_what_refers_to_the_shared_object():
    shared = [1, 2]
    results = run_all(repr, [[shared, i] for i in range(3)], 2, shared)
    assert sorted(result for _, result in results) == ["[[1, 2], 0]", "[[1, 2], 1]", "[[1, 2], 2]"]
