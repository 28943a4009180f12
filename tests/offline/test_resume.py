"""Conversions that are interrupted in every way: nothing half-made looks whole, and resuming gives the same bytes."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from alphaq_vllm import convert
from offline.operations import convert as operation
from offline.writing import writer

SHARD = 600_000
# From the weights alone, and by running the model.
WAYS = {
    "alone": {"bits": 3.0, "noise": "measured", "quantizer": "mse"},
    "run": {"bits": 3.0, "calibration_tokens": 2048, "calibration_length": 64},
}
# How many steps a run gets on, at most, before it is killed. All of them are about 230.
MOST_STEPS = {"alone": 40, "run": 70}
# Converts in a new process, as often as it is told to, without importing torch every time.
SERVER = """
import os, sys
from pathlib import Path
from alphaq_vllm import convert
from offline import journal
import torch, transformers.models.qwen2_moe.modeling_qwen2_moe
from tests.offline.test_resume import WAYS
journal.SECONDS_BETWEEN_COMMITS = 0.02
torch.set_num_threads(1)
way = WAYS[sys.argv[3]]
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        os.setsid()
        print("started", os.getpid(), flush=True)
        convert(sys.argv[1], Path(line.strip()), max_shard_size=int(sys.argv[2]), workers=1, resume=True, **way)
        os._exit(0)
    print("ended", os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model with 96 small matrices of experts."""
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, moe_intermediate_size=256, num_experts=16, shared_expert_intermediate_size=256,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("resume") / "source"
    transformers.Qwen2MoeForCausalLM(config).bfloat16().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory):
    """The files of an uninterrupted conversion in one of ``WAYS``."""

    @cache
    def make(way):
        out = tmp_path_factory.mktemp("expected") / "out"
        convert(source, out, **WAYS[way], max_shard_size=SHARD, workers=1)
        return digests(out)

    return make


@pytest.fixture
def expected(uninterrupted):
    """The files of an uninterrupted conversion from the weights alone."""
    return uninterrupted("alone")


def digests(directory):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def entries(out):
    """The kinds of entries in the journal of an interrupted run."""
    path = out.with_name(f"{out.name}.partial") / "journal.jsonl"
    return {key for line in path.read_bytes().splitlines(True) if line.endswith(b"\n") for key in json.loads(line)}


def start_command(source, out, *arguments):
    """The command in a process group of its own, without running the model unless the arguments say so."""
    alone = [] if "--quantizer" in arguments else ["--noise", "measured", "--quantizer", "mse"]
    arguments = [sys.executable, "-m", "offline.convert", source, out, "--bits", "3", *alone, *arguments]
    arguments += ["--max-shard-size", str(SHARD)]
    return subprocess.Popen(
        list(map(str, arguments)),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=heed_sigint,
    )


def heed_sigint():
    """What runs the tests may ignore SIGINT, as shells make background jobs do, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition, process=None):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.002)


def writing(out):
    return lambda: next(out.parent.glob(f"{out.name}.partial/checkpoint/*.tmp"), None)


def processes_of(session):
    """Processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def progress(out):
    """Entries of the journal, and files, that an interrupted run has left so far."""
    partial = out.with_name(f"{out.name}.partial")
    with suppress(FileNotFoundError):
        return (partial / "journal.jsonl").read_bytes().count(b"\n") + sum(1 for _ in partial.rglob("*.safetensors"))
    return 0


def kill_after(steps, pid, out):
    """Kill a run as soon as it has got some steps on, unless it ends before."""
    start = progress(out)
    while progress(out) < start + steps and Path(f"/proc/{pid}").exists():
        time.sleep(0.001)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("way", "wanted"),
    [
        ("alone", 20),
        ("run", 5),
        pytest.param("alone", 200, marks=pytest.mark.long),
        pytest.param("run", 50, marks=pytest.mark.long),
    ],
)
def test_convert_killed_at_random_moments_resumes_to_the_same_bytes(source, uninterrupted, tmp_path, way, wanted):
    """Moments are drawn by what a run has done, not by the clock, so that every run gets on, however slow it is."""
    files = uninterrupted(way)
    moments, stages, kills, runs = random.Random(wanted), set(), 0, 0
    expected_stages = {"stats", "plan", "written"} | ({"gains"} if way == "run" else set())
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(source), str(SHARD), way],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(10 * wanted):
            out = tmp_path / str(runs)
            enough = kills >= wanted and stages >= expected_stages
            if enough and not (tmp_path / f"{runs}.partial").exists():
                break
            print(out, file=server.stdin, flush=True)
            pid = int(server.stdout.readline().removeprefix("started "))
            if not enough:
                kill_after(moments.randint(0, MOST_STEPS[way]), pid, out)
            status = int(server.stdout.readline().removeprefix("ended "))
            killed = os.WIFSIGNALED(status)
            kills += killed
            # A run killed when all was in place has left nothing to resume.
            assert killed or status == 0 or out.exists()
            assert killed or not (tmp_path / f"{runs}.partial").exists()
            if (tmp_path / f"{runs}.partial" / "journal.jsonl").exists():
                stages |= entries(out)
            if out.exists():
                assert digests(out) == files
                runs += 1
    finally:
        server.stdin.close()
        server.wait()
    print(f"{kills} kills, {runs} checkpoints")
    assert runs
    assert kills >= wanted
    assert stages >= expected_stages


def test_convert_ends_its_processes_when_it_is_killed_alone(source, expected, tmp_path):
    process = start_command(source, tmp_path / "out", "--workers", "2")
    wait_for(writing(tmp_path / "out"), process)
    assert len(processes_of(process.pid)) > 3
    process.kill()
    process.communicate()
    wait_for(lambda: not processes_of(process.pid))
    assert not (tmp_path / "out").exists()
    convert(
        source,
        tmp_path / "out",
        bits=3.0,
        noise="measured",
        max_shard_size=SHARD,
        workers=1,
        resume=True,
        quantizer="mse",
    )
    assert digests(tmp_path / "out") == expected


def test_command_stops_cleanly_at_sigint_and_resumes(source, expected, tmp_path):
    out = tmp_path / "out"
    process = start_command(source, out, "--workers", "2")
    wait_for(writing(out), process)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 130
    lines = error.splitlines()
    way_out = f"{out}.partial keeps what is done: run the same command with --resume to continue"
    assert lines[-1] == f"error: interrupted: {way_out}"
    assert all(line.startswith("measure: ") for line in lines[:-1])
    assert not out.exists()
    process = start_command(source, out, "--workers", "1", "--resume")
    assert process.communicate()[1].startswith("write: ")
    assert process.returncode == 0
    assert digests(out) == expected


def test_command_stops_cleanly_at_sigint_while_processes_start(source, tmp_path):
    process = start_command(source, tmp_path / "out", "--workers", "2")
    wait_for(lambda: len(processes_of(process.pid)) > 2, process)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 130
    assert error.count("\n") == 1


@pytest.mark.parametrize("workers", [2, 3])
def test_convert_gives_the_same_bytes_whatever_the_number_of_workers(source, expected, tmp_path, workers):
    convert(
        source, tmp_path / "out", bits=3.0, noise="measured", max_shard_size=SHARD, workers=workers, quantizer="mse"
    )
    assert digests(tmp_path / "out") == expected


def interrupt(source, out, monkeypatch, error=KeyboardInterrupt):
    """Interrupt a conversion in the middle of writing."""
    calls = iter(range(100))
    write = writer._write_piece

    def fail_late(task):
        if next(calls, None) is None:
            raise error
        return write(task)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_piece", fail_late)
        with pytest.raises(type(error) if isinstance(error, Exception) else error, match="`resume`"):
            convert(source, out, bits=3.0, noise="measured", max_shard_size=SHARD, workers=1, quantizer="mse")


def test_convert_refuses_to_resume_what_has_changed(source, expected, tmp_path, monkeypatch):
    copy, out = shutil.copytree(source, tmp_path / "source"), tmp_path / "out"
    interrupt(copy, out, monkeypatch)
    with pytest.raises(ValueError, match=r"had settings\.widths\.average_bits = 3\.0, not 2\.5"):
        convert(copy, out, bits=2.5, noise="measured", max_shard_size=SHARD, resume=True, quantizer="mse")
    with pytest.raises(ValueError, match=f"had settings.max_shard_bytes = {SHARD}, not {2 * SHARD}"):
        convert(copy, out, bits=3.0, noise="measured", max_shard_size=2 * SHARD, resume=True, quantizer="mse")
    with pytest.raises(ValueError, match="add `resume` to continue"):
        convert(copy, out, bits=3.0, noise="measured", max_shard_size=SHARD, quantizer="mse")
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match="had a source with other files or older ones"):
        convert(copy, out, bits=3.0, noise="measured", max_shard_size=SHARD, resume=True, quantizer="mse")
    assert not out.exists()
    assert (tmp_path / "out.partial").exists()


def test_convert_reports_a_full_disk_and_resumes(source, expected, tmp_path, monkeypatch):
    interrupt(source, tmp_path / "out", monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", bits=3.0, noise="measured", max_shard_size=SHARD, resume=True, quantizer="mse")
    assert digests(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("alone", ["--noise", "measured", "--quantizer", "mse"]),
        ("run", ["--calibration-tokens", "2048", "--calibration-length", "64"]),
    ],
)
def test_command_reports_a_file_size_limit_and_resumes_without_it(source, uninterrupted, tmp_path, way, options):
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); "
    script += "from offline.cli import run; from offline.convert import main; run(main)"
    arguments = [
        str(source),
        str(tmp_path / "out"),
        "--bits",
        "3",
        "--max-shard-size",
        str(SHARD),
        "--workers",
        "2",
        *options,
    ]
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "error: [Errno 27] File too large: " in result.stderr
    assert "run the same command with --resume" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", **WAYS[way], max_shard_size=SHARD, resume=True)
    assert digests(tmp_path / "out") == uninterrupted(way)


@pytest.fixture
def mount(tmp_path):
    """``mount(*options)``: a small file system of its own, where the system permits it."""
    mounted = []

    def make(*options):
        path = tmp_path / f"mount{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join(("size=8m", *options)), "none", str(path)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file system is not permitted")
        mounted.append(path)
        return path

    yield make
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_convert_survives_a_disk_that_fills_up(source, expected, mount, monkeypatch, workers):
    disk = mount()
    # Room enough for the check, but not any more when the shards are written.
    monkeypatch.setattr(operation, "check_output", lambda *arguments: None)
    (disk / "other").write_bytes(bytes(7_000_000))
    with pytest.raises(OSError, match=r"No space left on device: .*`resume`") as caught:
        convert(
            source, disk / "out", bits=3.0, noise="measured", max_shard_size=SHARD, workers=workers, quantizer="mse"
        )
    assert caught.value.errno == errno.ENOSPC
    assert not (disk / "out").exists()
    (disk / "other").unlink()
    convert(
        source,
        disk / "out",
        bits=3.0,
        noise="measured",
        max_shard_size=SHARD,
        workers=workers,
        resume=True,
        quantizer="mse",
    )
    assert digests(disk / "out") == expected


def test_command_reports_a_target_that_cannot_be_written(source, tmp_path, mount):
    (tmp_path / "file").touch()
    read_only = mount()
    subprocess.run(["mount", "-o", "remount,ro", str(read_only)], check=True)
    for out, message in (
        (tmp_path / "file" / "out", "expected a directory"),
        (read_only / "out", "Read-only file system"),
    ):
        process = start_command(source, out)
        error = process.communicate()[1]
        assert process.returncode == 2
        assert message in error
        assert error.count("\n") == 1


def test_convert_reads_a_source_that_cannot_be_written(source, expected, tmp_path, mount):
    disk = mount("size=64m")
    shutil.copytree(source, disk / "source")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    convert(
        disk / "source", tmp_path / "out", bits=3.0, noise="measured", max_shard_size=SHARD, workers=1, quantizer="mse"
    )
    found = digests(tmp_path / "out")
    assert {name for name in expected if found[name] != expected[name]} <= {"README.md", "SHA256SUMS"}


@pytest.mark.parametrize("workers", [1, 2])
def test_convert_reports_a_source_that_vanishes_and_resumes(source, expected, tmp_path, monkeypatch, workers):
    (tmp_path / "a").mkdir()
    copy = shutil.copytree(source, tmp_path / "a" / "source")
    (weights,) = copy.glob("*.safetensors")
    write = writer.run_all

    def vanishing(*arguments, **options):
        tasks = write(*arguments, **options)
        yield next(tasks)
        weights.rename(tmp_path / "elsewhere")
        yield from tasks

    with monkeypatch.context() as patch:
        patch.setattr(writer, "run_all", vanishing)
        with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*`resume` .*model\.safetensors"):
            convert(
                copy,
                tmp_path / "out",
                bits=3.0,
                noise="measured",
                max_shard_size=SHARD,
                workers=workers,
                quantizer="mse",
            )
    assert not (tmp_path / "out").exists()
    (tmp_path / "elsewhere").rename(weights)
    convert(
        copy,
        tmp_path / "out",
        bits=3.0,
        noise="measured",
        max_shard_size=SHARD,
        resume=True,
        workers=workers,
        quantizer="mse",
    )
    assert digests(tmp_path / "out").keys() == expected.keys()
