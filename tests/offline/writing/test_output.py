"""The directory of a result: whole or not there, and taken up again after an interruption."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from offline.journal import KEPT
from offline.source.checkpoint import open_checkpoint
from offline.writing import output as module
from offline.writing.output import check_output, conditions, open_output, resolved


def interrupted(out, depends_on=None, error=KeyboardInterrupt):
    """Leave what a run leaves that made one file and was interrupted."""
    with pytest.raises(error), open_output(out, depends_on or {}) as output:
        (output.directory / "file").write_text("x")
        raise error


def test_open_output_appears_whole(tmp_path):
    out = tmp_path / "new" / "out"
    with open_output(out, {}) as output:
        (output.directory / "file").write_text("x")
        assert not out.exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["file"]


def test_open_output_replaces_an_empty_directory(tmp_path):
    (tmp_path / "out").mkdir()
    with open_output(tmp_path / "out", {}) as output:
        (output.directory / "file").write_text("x")
    assert (tmp_path / "out" / "file").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_open_output_needs_nothing_to_resume(tmp_path, resume):
    with open_output(tmp_path / "out", {}, resume) as output:
        assert output.journal.entries == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_open_output_leaves_nothing_when_the_input_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"^wrong$"), open_output(tmp_path / "out", {}):
        raise ValueError("wrong")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), "^interrupted: .*out.partial keeps what is done: run the same command with `resume`"),
        (ChildProcessError("a worker died"), "^a worker died: .*out.partial keeps what is done: .*`resume`"),
        (OSError(28, "No space left", "f"), "^.Errno 28. No space left: .*out.partial keeps .* `resume` .*: 'f'$"),
        (KeyError("bug"), "^'bug'$"),
    ],
)
def test_open_output_keeps_what_is_done_and_says_how_to_go_on(tmp_path, error, message):
    with pytest.raises(type(error), match=message), open_output(tmp_path / "out", {"a": 1}) as output:
        (output.directory / "file").write_text("x")
        output.journal.record({"file": 1})
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    with open_output(tmp_path / "out", {"a": 1}, resume=True) as output:
        assert output.journal.entries == [{"a": 1}, {"file": 1}]
        assert (output.directory / "file").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_open_output_resumes_only_when_asked(tmp_path):
    interrupted(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out\.partial: exists already, .*: add `resume` to continue"):
        open_output(tmp_path / "out", {}).__enter__()
    assert (tmp_path / "out.partial" / "checkpoint" / "file").exists()


def test_open_output_has_one_writer(tmp_path):
    with open_output(tmp_path / "out", {}) as output:
        with pytest.raises(ValueError, match="exists already, so another run is writing it"):
            open_output(tmp_path / "out", {}).__enter__()
        with pytest.raises(ValueError, match=r"out\.partial: another run is writing it"):
            open_output(tmp_path / "out", {}, resume=True).__enter__()
        assert output.directory.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "b"}, "had a source with other files or older ones: run the same command"),
        ({"settings": {"bits": 4, "c": None}}, r"had settings\.bits = 3, not 4: run the same command"),
        ({"torch": "3"}, "had torch = '2', not '3'"),
    ],
)
def test_open_output_refuses_to_resume_other_work(tmp_path, change, message):
    before = {"source": "a", "settings": {"bits": 3, "c": None}, "torch": "2"}
    interrupted(tmp_path / "out", before)
    with pytest.raises(ValueError, match=message):
        open_output(tmp_path / "out", {**before, **change}, resume=True).__enter__()
    assert (tmp_path / "out.partial" / "checkpoint" / "file").exists()


def test_open_output_refuses_to_resume_what_it_did_not_make(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").write_text("x")
    with pytest.raises(ValueError, match=r"out\.partial: expected what an interrupted run left"):
        open_output(tmp_path / "out", {}, resume=True).__enter__()
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["precious"]


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1'], ids=["no journal", "empty", "torn"])
def test_open_output_resumes_what_was_killed_at_once(tmp_path, content):
    (tmp_path / "out.partial").mkdir()
    if content is not None:
        (tmp_path / "out.partial" / "journal.jsonl").write_bytes(content)
    with open_output(tmp_path / "out", {"a": 1}, resume=True) as output:
        (output.directory / "file").write_text("x")
    assert (tmp_path / "out" / "file").exists()


def test_open_output_does_not_trust_files_without_their_journal(tmp_path):
    interrupted(tmp_path / "out")
    (tmp_path / "out.partial" / "journal.jsonl").write_bytes(b"\0\0\n")
    with pytest.raises(ValueError, match=r"expected a whole journal\.jsonl, got a damaged one"):
        open_output(tmp_path / "out", {}, resume=True).__enter__()


def killed(*arguments, **options):
    raise SystemExit


@pytest.mark.parametrize("step", ["rename", "unlink"])
def test_open_output_resumes_what_was_killed_at_the_end(tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), step, killed)
        with pytest.raises(SystemExit), open_output(tmp_path / "out", {"a": 1}) as output:
            (output.directory / "file").write_text("x")
    assert (tmp_path / "out").exists() == (step == "unlink")
    check_output(tmp_path / "out", tmp_path / "source", 0, resume=True)
    with open_output(tmp_path / "out", {"a": 1}, resume=True) as output:
        assert (output.directory / "file").exists()
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("resume", [False, True])
def test_check_output_removes_what_a_run_leaves_that_was_killed_when_it_was_complete(tmp_path, monkeypatch, resume):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(SystemExit), open_output(tmp_path / "out", {}) as output:
            (output.directory / "file").write_text("x")
            output.directory.with_name(KEPT).mkdir()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.partial"}
    with pytest.raises(ValueError, match="got one with files" + resume * r" \(there is nothing to resume: "):
        check_output(tmp_path / "out", tmp_path / "source", 0, resume)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "x"


def test_check_output_leaves_alone_what_no_run_of_its_own_left(tmp_path):
    for name in ("out", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("x")
    check_output(tmp_path / "out", tmp_path / "source", 0, resume=True)
    assert (tmp_path / "out.partial" / "precious").exists()


def test_open_output_does_not_replace_files_that_came_in_the_meantime(tmp_path):
    interrupted(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(ValueError, match="got one with files"):
        open_output(tmp_path / "out", {}, resume=True).__enter__()
    assert (tmp_path / "out" / "precious").exists()


def test_conditions_change_with_everything_that_matters(model, monkeypatch):
    def now(settings):
        return json.dumps(conditions(open_checkpoint(str(model)), settings))

    first = now({"bits": 3, "widths": (2, 3)})
    assert now({"bits": 3, "widths": (2, 3)}) == first
    assert now({"bits": 4, "widths": (2, 3)}) != first
    with monkeypatch.context() as patch:
        patch.setattr(module, "VERSION", "other")
        assert now({"bits": 3, "widths": (2, 3)}) != first
    weights = model / "model.safetensors"
    changed = weights.stat().st_mtime_ns
    os.utime(weights, ns=(changed, changed + 1))
    assert now({"bits": 3, "widths": (2, 3)}) != first
    os.utime(weights, ns=(changed, changed))
    assert now({"bits": 3, "widths": (2, 3)}) == first
    (model / "tokenizer.json").write_text("{}")
    assert now({"bits": 3, "widths": (2, 3)}) != first


def test_check_output_refuses_the_source_and_what_is_inside_it(tmp_path):
    for out in (tmp_path, tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(ValueError, match="outside the source"):
            check_output(out, tmp_path, 0)


def test_check_output_refuses_what_exists(tmp_path):
    (tmp_path / "out").mkdir()
    check_output(tmp_path / "out", tmp_path / "source", 0)
    (tmp_path / "out" / "file").write_text("x")
    for resume in (False, True):
        with pytest.raises(ValueError, match="got one with files"):
            check_output(tmp_path / "out", tmp_path / "source", 0, resume)
    with pytest.raises(ValueError, match="got a file"):
        check_output(tmp_path / "out" / "file", tmp_path / "source", 0)


def test_check_output_refuses_a_place_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file: expected a directory to put out in, got a file"):
        check_output(tmp_path / "file" / "new" / "out", tmp_path / "source", 0)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("lay", [Path.touch, lambda path: path.symlink_to("nowhere")], ids=["file", "link"])
def test_check_output_refuses_a_partial_that_is_no_directory(tmp_path, lay, resume):
    lay(tmp_path / "out.partial")
    with pytest.raises(ValueError, match=r"out\.partial: expected a directory or nothing, got a file or a link"):
        check_output(tmp_path / "out", tmp_path / "source", 0, resume)


def test_check_output_refuses_a_link_to_itself(tmp_path):
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(ValueError, match="got a link to itself: choose another name"):
        check_output(resolved(tmp_path / "out"), tmp_path / "source", 0)


def test_check_output_refuses_a_mount_point(tmp_path, monkeypatch):
    monkeypatch.setattr(type(tmp_path), "is_mount", lambda self: True)
    with pytest.raises(ValueError, match="a new directory inside it"):
        check_output(tmp_path / "out", tmp_path / "source", 0)


def test_check_output_wants_room_for_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9 if path == tmp_path else 0))
    check_output(tmp_path / "new" / "out", tmp_path / "source", 10**9)
    with pytest.raises(ValueError, match=r"expected 2\.0 GB of free disk space, got 1\.0 GB"):
        check_output(tmp_path / "new" / "out", tmp_path / "source", 2 * 10**9)


def test_check_output_counts_what_is_there_already_as_room(tmp_path, monkeypatch):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "file").write_bytes(bytes(2**20))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    check_output(tmp_path / "out", tmp_path / "source", 2**20, resume=True)
    with pytest.raises(ValueError, match="of free disk space"):
        check_output(tmp_path / "out", tmp_path / "source", 2**20)


def test_case_15_an_interrupted_conversion_of_the_longest_name_is_resumed(tmp_path):
    """Its partial directory has another name than those of names that begin alike."""
    out, other = tmp_path / ("n" * 255), tmp_path / ("n" * 254 + "m")
    interrupted(out)
    interrupted(other)
    assert len(list(tmp_path.iterdir())) == 2
    assert all(path.name.endswith(".partial") and len(path.name) <= 255 for path in tmp_path.iterdir())
    for path in (out, other):
        check_output(path, tmp_path / "source", 0, resume=True)
        with open_output(path, {}, resume=True) as output:
            assert (output.directory / "file").exists()
    assert {path.name for path in tmp_path.iterdir()} == {out.name, other.name}


def test_case_15_the_file_system_says_how_long_a_name_may_be(tmp_path, monkeypatch):
    """Encrypted directories take fewer bytes."""
    monkeypatch.setattr(os, "pathconf", lambda path, name: {"PC_NAME_MAX": 143}[name])
    check_output(tmp_path / ("n" * 143), tmp_path / "source", 0)
    with pytest.raises(ValueError, match="expected names of at most 143 bytes, got one of 144: choose a shorter one"):
        check_output(tmp_path / ("n" * 144), tmp_path / "source", 0)
    interrupted(tmp_path / ("n" * 143))
    (partial,) = tmp_path.iterdir()
    assert len(partial.name) == 143
