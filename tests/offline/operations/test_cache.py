"""Where statistics are kept, also for users without a home."""

import shutil

import pytest

from offline.allocation.widths import Budget
from offline.operations.cache import cache_directory, cached_statistics
from offline.operations.plan import Job
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts
from tests.reliability.surroundings import home_is_a_file, no_home


@pytest.fixture
def job(tiny_model):
    source = open_checkpoint(str(tiny_model("mixtral")))
    return Job(str(source.path), source, find_experts(source))


def test_case_8_home_is_asked_for_only_when_it_is_needed(monkeypatch, tmp_path):
    no_home(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=r"^ALPHAQ_CACHE: expected a directory .* no home directory: set it$"):
        cache_directory()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "alphaq"
    monkeypatch.setenv("ALPHAQ_CACHE", str(tmp_path / "other"))
    assert cache_directory() == tmp_path / "other"


def test_case_8_statistics_are_kept_without_a_home_where_the_variable_says(job, monkeypatch, tmp_path):
    """As vLLM measures a model in full precision, in another process."""
    no_home(monkeypatch, tmp_path)
    monkeypatch.setenv("ALPHAQ_CACHE", str(tmp_path / "cache"))
    statistics, where = cached_statistics(job, Budget(noise="analytic"))
    assert len(statistics.matrices) == 24 and f"saved in {tmp_path / 'cache'}" in where
    assert "statistics reused" in cached_statistics(job, Budget(noise="analytic"))[1]


@pytest.mark.parametrize("place", ["home", "variable"])
def test_case_8_a_directory_that_cannot_be_made_is_named_with_the_way_out(job, monkeypatch, tmp_path, place):
    home_is_a_file(monkeypatch, tmp_path)
    if place == "variable":
        monkeypatch.setenv("ALPHAQ_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match=r"file/.*: expected a directory .* Not a directory.*: set ALPHAQ_CACHE"):
        cached_statistics(job, Budget())


def test_case_15_statistics_are_kept_of_a_model_with_the_longest_name(tiny_model, monkeypatch, tmp_path):
    monkeypatch.setenv("ALPHAQ_CACHE", str(tmp_path / "cache"))
    source = open_checkpoint(str(shutil.copytree(tiny_model("mixtral"), tmp_path / ("模" * 85))))
    _, where = cached_statistics(Job(str(source.path), source, find_experts(source)), Budget(noise="analytic"))
    assert "saved in" in where
