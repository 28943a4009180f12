"""What was verified once is remembered: no file is read twice, and no changed file passes for the one that was read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alphaq_vllm import checksums
from alphaq_vllm.checksums import SUMS, render_sums
from alphaq_vllm.plugin import files, verified
from alphaq_vllm.plugin.files import VERIFY, check_files
from tests.reliability.surroundings import home_is_a_file, no_home

# A process of its own, which need not import vLLM for this.
CHECK = """
import sys
from pathlib import Path
from alphaq_vllm.checksums import compare_sums
from alphaq_vllm.plugin import verified
verified.STEP = 0
sums = verified.VerifiedSums(Path(sys.argv[1]), reuse=True)
comparison = compare_sums(sums.directory, sums.sum_of)
sys.exit(sums.save(comparison.found))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test alone; files count as settled at once."""
    monkeypatch.setenv("ALPHAQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(VERIFY, raising=False)
    monkeypatch.setattr(verified, "STEP", 0)
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tmp_path):
    """What of a checkpoint is compared: some files and their sums."""
    folder = tmp_path / "checkpoint"
    (folder / "templates").mkdir(parents=True)
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors", "templates/a.jinja", "README.md"):
        (folder / name).write_text(f"contents of {name}")
    (folder / SUMS).write_text(render_sums(folder))
    return folder


@pytest.fixture
def start(monkeypatch):
    """Check a checkpoint as a new process would; returns the names of the files that were read."""

    def start(path):
        read = []
        with monkeypatch.context() as patch:
            patch.setattr(verified, "sha256", lambda file: read.append(file.name) or checksums.sha256(file))
            check_files.cache_clear()
            check_files(path)
        return sorted(read)

    return start


@pytest.fixture
def log(monkeypatch):
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(files.logger, level, lambda text, *values: lines.append(text % values))
    return lines


def rewrite(file, old, new):
    """Change contents in place, of the same length and, as far as programs can, at the same time."""
    assert len(old) == len(new)
    status = file.stat()
    file.write_text(file.read_text().replace(old, new))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


ALL = ["README.md", "a.jinja", "config.json", "model-1.safetensors", "model-2.safetensors"]


def test_a_restart_reads_nothing(checkpoint, start, log):
    assert start(checkpoint) == ALL
    assert start(checkpoint) == []
    assert "checked 5 files" in log[0]
    assert "(5 read, 0 unchanged since they were read)" in log[0]
    assert "(0 read, 5 unchanged since they were read)" in log[1]
    assert len(log) == 2


def test_the_same_directory_by_another_name_is_the_same(checkpoint, start, tmp_path, monkeypatch):
    start(checkpoint)
    (tmp_path / "link").symlink_to(checkpoint)
    assert start(tmp_path / "link") == []
    monkeypatch.chdir(tmp_path)
    assert start(Path("checkpoint")) == []


def test_another_directory_is_another(checkpoint, start, tmp_path):
    start(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert start(tmp_path / "copy") == ALL


def test_a_directory_in_the_place_of_another_is_read(checkpoint, start, tmp_path):
    start(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "copy")
    shutil.rmtree(checkpoint)
    (tmp_path / "copy").rename(checkpoint)
    assert start(checkpoint) == ALL


def test_full_reads_everything_at_every_start(checkpoint, start, monkeypatch):
    start(checkpoint)
    for value in ("full", "FULL", "1"):
        monkeypatch.setenv(VERIFY, value)
        assert start(checkpoint) == ALL


@pytest.mark.parametrize("value", ["off", "0"])
def test_off_reads_nothing(checkpoint, start, monkeypatch, value):
    (checkpoint / "config.json").write_text("{}")
    monkeypatch.setenv(VERIFY, value)
    assert start(checkpoint) == []


def test_another_value_is_refused_with_those_that_there_are(checkpoint, start, monkeypatch):
    monkeypatch.setenv(VERIFY, "never")
    with pytest.raises(ValueError, match=r"^ALPHAQ_VERIFY: expected full .*, once .* or off, got 'never': set it"):
        start(checkpoint)


def test_a_changed_file_is_read_again(checkpoint, start):
    start(checkpoint)
    (checkpoint / "config.json").touch()
    assert start(checkpoint) == ["config.json"]


@pytest.mark.parametrize("value", ["once", "full"])
def test_a_file_that_looks_as_before_is_refused(checkpoint, start, monkeypatch, value):
    start(checkpoint)
    monkeypatch.setenv(VERIFY, value)
    rewrite(checkpoint / "model-1.safetensors", "contents", "CONTENTS")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"got others in model-1\.safetensors: copy it again, or set .*=off if"):
            start(checkpoint)


def test_a_file_in_the_place_of_another_is_refused(checkpoint, start, tmp_path):
    file, other = checkpoint / "model-1.safetensors", tmp_path / "other"
    start(checkpoint)
    other.write_text(file.read_text().replace("contents", "CONTENTS"))
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.rename(file)
    with pytest.raises(ValueError, match=r"got others in model-1\.safetensors"):
        start(checkpoint)


def test_a_link_that_leads_elsewhere_is_refused(checkpoint, start, tmp_path):
    file = checkpoint / "model-1.safetensors"
    file.rename(tmp_path / "good")
    file.symlink_to(tmp_path / "good")
    start(checkpoint)
    assert start(checkpoint) == []
    shutil.copy2(tmp_path / "good", tmp_path / "bad")
    rewrite(tmp_path / "bad", "contents", "CONTENTS")
    file.unlink()
    file.symlink_to(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"got others in model-1\.safetensors"):
        start(checkpoint)


def test_other_sums_are_compared_with_what_was_read(checkpoint, start):
    start(checkpoint)
    text = (checkpoint / SUMS).read_text()
    (checkpoint / SUMS).write_text(text.replace(text[:64], "0" * 64, 1))
    # The first is of the card. What is kept is what a file has, not that it was right.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "EDITABLE", ())
        with pytest.raises(ValueError, match=r"got others in README\.md"):
            start(checkpoint)


def test_what_was_found_right_beside_a_damaged_file_is_not_read_again(checkpoint, start):
    file = checkpoint / "model-2.safetensors"
    good = file.read_text()
    file.write_text("damaged")
    with pytest.raises(ValueError, match="copy it again"):
        start(checkpoint)
    file.write_text(good)
    assert start(checkpoint) == ["model-2.safetensors"]


def test_a_file_that_was_refused_is_read_again(checkpoint, start, monkeypatch):
    """A machine can err while it reads."""
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "sha256", lambda file: "0" * 64)
        with pytest.raises(ValueError, match="copy it again"):
            start(checkpoint)
    assert start(checkpoint) == ALL


def test_full_takes_back_what_once_believed(checkpoint, start, cache, monkeypatch):
    """A disk loses bits without a change of times."""
    start(checkpoint)
    rewrite(checkpoint / "model-1.safetensors", "contents", "CONTENTS")
    (file,) = cache.rglob("*.json")
    content = json.loads(file.read_bytes())
    entry = content["files"]["model-1.safetensors"]
    entry[:-1] = verified._state(checkpoint / "model-1.safetensors")
    file.write_text(json.dumps(content))
    assert start(checkpoint) == []
    for value in ("full", "once"):
        monkeypatch.setenv(VERIFY, value)
        with pytest.raises(ValueError, match=r"got others in model-1\.safetensors"):
            start(checkpoint)


def test_a_file_that_may_still_be_written_is_not_remembered(checkpoint, start, monkeypatch):
    monkeypatch.setattr(verified, "STEP", 10**12)
    assert start(checkpoint) == ALL
    assert start(checkpoint) == ALL


def test_a_file_that_changes_while_it_is_read_is_not_remembered(checkpoint, start, monkeypatch):
    def change(file):
        digest = checksums.sha256(file)
        if file.name == "config.json":
            file.touch()
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(verified, "sha256", change)
        check_files.cache_clear()
        check_files(checkpoint)
    assert start(checkpoint) == ["config.json"]


DAMAGE = {
    "empty": b"",
    "half": None,
    "not UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "no files": b'{"directory": "/"}',
    "files of another kind": b'{"directory": %s, "files": [1]}',
    "entries of another kind": b'{"directory": %s, "files": {"config.json": 1, "README.md": [], "a": ["b"]}}',
    "deep": b"[" * 100_000,
    "huge number": b"9" * 10_000,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_memory_counts_as_none(checkpoint, start, cache, log, name):
    start(checkpoint)
    (file,) = cache.rglob("*.json")
    good = file.read_bytes()
    damaged = good[: len(good) // 2] if DAMAGE[name] is None else DAMAGE[name]
    file.write_bytes(damaged.replace(b"%s", json.dumps(str(checkpoint)).encode()))
    assert start(checkpoint) == ALL
    assert file.read_bytes() == good
    assert len(log) == 2


def test_no_part_of_a_memory_is_left_when_the_disk_is_full(checkpoint, start, cache, monkeypatch, log):
    def full(path, text):
        path.write_bytes(b"{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert start(checkpoint) == ALL
    assert [*cache.rglob("*.*")] == []
    assert "at the next start, for it cannot keep their sums: [Errno 28] No space left on device" in log[-1]


def user_without_home(patch, tmp_path):
    patch.setenv("ALPHAQ_CACHE", "~nobody-of-this-name/cache")


def read_only(patch, tmp_path):
    def refuse(*arguments, **options):
        raise OSError(30, "Read-only file system")

    patch.setattr(Path, "mkdir", refuse)


@pytest.mark.parametrize("place", [no_home, home_is_a_file, user_without_home, read_only])
def test_case_8_without_a_place_for_sums_files_are_always_read(checkpoint, start, tmp_path, monkeypatch, log, place):
    place(monkeypatch, tmp_path)
    for _ in range(2):
        log.clear()
        assert start(checkpoint) == ALL
        assert len(log) == 2
        assert log[1].startswith("AlphaQ will read these files again at the next start, for it cannot keep their sums")


def test_a_place_is_asked_for_only_when_it_is_needed(checkpoint, start, monkeypatch, tmp_path, log):
    no_home(monkeypatch, tmp_path)
    monkeypatch.setenv(VERIFY, "off")
    start(checkpoint)
    monkeypatch.delenv(VERIFY)
    start(tmp_path / "someone" / "some-model")
    assert log == []


def test_a_memory_that_cannot_be_written_is_used(checkpoint, start, monkeypatch, tmp_path, log):
    start(checkpoint)
    read_only(monkeypatch, tmp_path)
    log.clear()
    assert start(checkpoint) == []
    assert len(log) == 1


def test_processes_that_start_together_do_not_disturb_each_other(checkpoint, start, cache):
    processes = [subprocess.Popen([sys.executable, "-c", CHECK, str(checkpoint)]) for _ in range(3)]
    assert [process.wait(timeout=600) for process in processes] == [0, 0, 0]
    assert len([*cache.rglob("*.*")]) == 1
    assert start(checkpoint) == []
