"""Where statistics are kept, also for users without a home."""

from pathlib import Path

import pytest

from offline.allocation.widths import Budget
from offline.operations.cache import cache_directory, cached_statistics
from offline.operations.plan import Job
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts


@pytest.fixture
def no_home(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    for name in ("ALPHAQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_home_is_asked_for_only_when_it_is_needed(no_home, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"^ALPHAQ_CACHE: expected a directory .* no home directory: set it$"):
        cache_directory()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "alphaq"
    monkeypatch.setenv("ALPHAQ_CACHE", str(tmp_path / "other"))
    assert cache_directory() == tmp_path / "other"


def test_a_directory_that_cannot_be_made_is_named_with_the_way_out(tiny_model, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ALPHAQ_CACHE", str(tmp_path / "file" / "cache"))
    source = open_checkpoint(str(tiny_model("mixtral")))
    job = Job(str(source.path), source, find_experts(source))
    with pytest.raises(ValueError, match=r"file/cache: expected a directory .* Not a directory.*: set ALPHAQ_CACHE"):
        cached_statistics(job, Budget())
