"""The record of finished work: what was committed stays, what a kill has torn does not count."""

import os

import pytest

from offline import journal
from offline.journal import Journal


def written(path, *entries):
    record = Journal(path)
    for entry in entries:
        record.record(entry)
    record.commit()
    record.close()


def test_journal_finds_what_was_committed(tmp_path):
    entries = [{"a": 0.1 + 0.2}, {"b": [1, 2]}, {"ü": "\n"}]
    written(tmp_path / "journal", *entries)
    assert Journal(tmp_path / "journal").entries == entries


@pytest.mark.parametrize("kept", range(1, 20))
def test_journal_drops_a_torn_line_and_goes_on_after_the_whole_ones(tmp_path, kept):
    path = tmp_path / "journal"
    written(path, {"first": 1}, {"second": 22})
    content = path.read_bytes()
    path.write_bytes(content[: -len('{"second": 22}\n')] + b'{"second": 22}\n'[: kept - 1])
    written(path, {"third": 3})
    expected = [{"first": 1}, {"second": 22}, {"third": 3}] if kept > 15 else [{"first": 1}, {"third": 3}]
    assert Journal(path).entries == expected


def test_journal_ignores_everything_after_damage(tmp_path):
    (tmp_path / "journal").write_bytes(b'{"a": 1}\n\0\0\0\n{"b": 2}\n')
    assert Journal(tmp_path / "journal").entries == [{"a": 1}]


def test_journal_commits_now_and_then_what_it_vouches_for_first(tmp_path, monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(journal, "sync", lambda path: order.append((path.name, (tmp_path / "journal").stat().st_size)))
    record = Journal(tmp_path / "journal")
    record.record({"a": 1}, tmp_path / "data")
    now[0] = 1.9
    record.record({"b": 1}, tmp_path / "data")
    assert (tmp_path / "journal").stat().st_size == 0
    now[0] = 2.0
    record.record({"c": 1}, tmp_path / "data")
    assert order == [("data", 0)]
    assert len((tmp_path / "journal").read_bytes().splitlines()) == 3


def test_journal_has_one_owner(tmp_path):
    first = Journal(tmp_path / "journal")
    with pytest.raises(ValueError, match=f"{tmp_path}: another run is writing it"):
        Journal(tmp_path / "journal")
    first.close()
    Journal(tmp_path / "journal").close()


def test_journal_writes_all_where_a_call_writes_a_part(tmp_path):
    class Trickle:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            return self.file.write(content[:3])

        def fileno(self):
            return self.file.fileno()

    record = Journal(tmp_path / "journal")
    record._file = Trickle(record._file)
    record.record({"a": "long enough"})
    record.commit()
    assert (tmp_path / "journal").read_bytes() == b'{"a": "long enough"}\n'
    os.close(record._file.fileno())


def test_journal_never_vouches_for_what_failed_to_become_durable(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    record = Journal(tmp_path / "journal")
    record.record({"a": 1}, tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(journal, "sync", fail)
        with pytest.raises(OSError, match="Input/output"):
            record.commit()
    record.commit()
    record.close()
    assert Journal(tmp_path / "journal").entries == []
