"""A real server under 200 clients that stream, hang up and send nonsense: right to the last token, and no leak."""

import time
from pathlib import Path

import pytest

from benchmarks.load import BAD_REQUESTS, Load, Step, compare, serve_and_run
from benchmarks.memory import sampled

TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()
# On a CPU, unquantized vLLM gives the same bits whatever the batch.
BOUND = 0.05
# In MiB. Before oneDNN was given few shapes to keep, a server grew by 160 in every minute.
MAX_GROWTH = 64
SECONDS = 600
ARGUMENTS = ["--quantization", "alphaq", "--dtype", "bfloat16"]


@pytest.mark.long
def test_server_under_load_answers_like_a_quiet_one(mixed_checkpoint, tmp_path):
    load = serve_and_run(mixed_checkpoint, TEXT, 200, SECONDS, ARGUMENTS, tmp_path / "log")
    print(load.figures())
    load.check(BOUND)
    assert load.requests["bad"] > 3 * len(BAD_REQUESTS)
    assert load.compared_tokens > 10_000
    assert load.memory_growth() < MAX_GROWTH
    # Told to stop, vLLM's processes sometimes log that another has stopped before them.
    log = (tmp_path / "log").read_text().partition("[shutdown]")[0]
    assert "Traceback" not in log
    assert "ERROR" not in log


def test_memory_of_a_tenth_without_a_sample_is_that_of_the_last_one():
    sizes = [100, 300, 200, 500]
    load = Load(seconds=10.0, memory=[(t, m * 2**20) for t, m in zip((0.0, 1.5, 2.5, 8.2), sizes, strict=True)])
    assert load.memory_by_tenths() == [100, 300, 300, 200, 200, 200, 200, 200, 500, 500]
    assert load.memory_growth() == 300


def test_a_watcher_of_memory_that_dies_is_not_quiet():
    with pytest.raises(IndexError), sampled([1].pop, 0.001):
        time.sleep(0.1)


QUIET = [Step("a", -0.5, 1.0), Step("b", -0.7, 0.01), Step("c", -0.2, 3.0)]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (QUIET, None),
        ([QUIET[0], Step("x", -0.7, 0.01), Step("y", -5.0, 1.0)], None),
        ([Step("a", -0.6, 1.0), *QUIET[1:]], "expected log-probabilities within 0.05"),
        ([Step("x", -0.5, 1.0), *QUIET[1:]], "other tokens at margins up to 1.0"),
    ],
    ids=["same", "other token where two were close", "other probability", "other token"],
)
def test_check_tells_rounding_from_faults(found, message):
    load = Load()
    compare(load, QUIET, found)
    if message is None:
        load.check(BOUND)
        return
    with pytest.raises(ValueError, match=message):
        load.check(BOUND)


def test_check_reports_requests_that_failed():
    with pytest.raises(ValueError, match="1 requests failed, the first: sample: reset"):
        Load(failures=["sample: reset"]).check(BOUND)


def test_compare_wants_whole_completions():
    with pytest.raises(ValueError, match="shorter"):
        compare(Load(), QUIET, QUIET[:2])
