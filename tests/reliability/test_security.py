"""A checkpoint is data: nothing in it is run, and nothing outside its directory is read or written."""

import ast
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from alphaq_vllm import convert, validate
from alphaq_vllm.checksums import SUMS
from offline.source import header
from offline.source.checkpoint import CONFIG, INDEX, SINGLE, open_checkpoint

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for room in ("alphaq_vllm", "offline") for path in (ROOT / room).rglob("*.py"))
# Leaves a file, when it is imported or unpickled.
HOSTILE = "from pathlib import Path\nPath({!r}).touch()\n"


def calls(path):
    """The names of what a file calls, with the call."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_unpickles_a_file():
    """pickle serves processes of one command alone, which send each other what they made themselves."""
    allowed = {ROOT / "offline" / "parallel.py"}
    for path in SOURCES:
        for name, node in calls(path):
            if name.split(".")[-1] in ("Unpickler", "load", "loads") and "pickle" in name and path not in allowed:
                pytest.fail(f"{path}:{node.lineno}: {name}")
            assert name not in ("torch.load", "eval", "exec", "compile", "np.load", "numpy.load"), f"{path}: {name}"
    parallel = (ROOT / "offline" / "parallel.py").read_text()
    assert "open(" not in parallel and "Path" not in parallel


def test_nothing_trusts_remote_code():
    for path in SOURCES:
        for _, node in calls(path):
            for keyword in node.keywords:
                trusted = keyword.arg == "trust_remote_code" and getattr(keyword.value, "value", True)
                assert not trusted, f"{path}:{node.lineno}"


@pytest.fixture
def hostile(tiny_source, tmp_path):
    """A model whose config asks for code that it brings along, and the file that the code would leave."""
    path, mark = shutil.copytree(tiny_source, tmp_path / "hostile"), tmp_path / "executed"
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    auto_map = {name: f"modeling_hostile.{name}" for name in classes}
    config = json.loads((path / CONFIG).read_bytes())
    (path / CONFIG).write_text(json.dumps({**config, "auto_map": auto_map}))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["modeling_hostile.T", None]}})
    )
    (path / "modeling_hostile.py").write_text(HOSTILE.format(str(mark)))
    return path, mark


def test_no_command_runs_code_from_a_checkpoint(hostile, tmp_path):
    model, mark = hostile
    out, text = tmp_path / "out", tmp_path / "text"
    text.write_text("Some text to calibrate on. " * 200)
    commands = [
        ("measure", model, "-o", tmp_path / "stats.csv", "--group-size", "32"),
        ("allocate", tmp_path / "stats.csv", "-o", tmp_path / "map.json"),
        ("convert", model, out, "--group-size", "32", "--stats", tmp_path / "stats.csv"),
        ("convert", model, tmp_path / "gptq", "--group-size", "32", "--quantizer", "gptq", "--calibration", text),
        ("inspect", out),
        ("validate", out, "--source", model),
        ("dequantize", out, tmp_path / "dequantized"),
    ]
    script = "import sys; from offline.__main__ import main\nfor line in sys.stdin:\n"
    script += "    sys.argv = ['alphaq', *line.rstrip().split('\\t')]\n"
    script += "    try: main()\n    except SystemExit as end: print(sys.argv[1], end.code)\n"
    lines = "\n".join("\t".join(map(str, command)) for command in commands)
    result = subprocess.run([sys.executable, "-c", script], input=lines, capture_output=True, text=True, check=True)
    ended = [line for line in result.stdout.splitlines() if line.split(" ")[0] in {name for name, *_ in commands}]
    # GPTQ needs a tokenizer, which here is code, and so it ends with an error.
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "tokenizer" in error
    assert [line.split(" ")[1] for line in ended] == ["0", "0", "0", "2", "0", "0", "0"], result.stderr
    assert not mark.exists()
    # The tokenizer needs it, and so it is taken along, as a file.
    copies = list(tmp_path.rglob("modeling_hostile.py"))
    assert len(copies) == 3
    assert {copy.read_bytes() for copy in copies} == {(model / "modeling_hostile.py").read_bytes()}
    assert "auto_map" not in json.loads((out / CONFIG).read_bytes())


def test_code_of_the_hostile_model_would_have_run(hostile):
    """The trap of the test above works."""
    model, mark = hostile
    subprocess.run([sys.executable, str(model / "modeling_hostile.py")], check=True)
    assert mark.exists()


class Payload:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", SINGLE, CONFIG, INDEX])
def test_pickled_weights_are_not_run(tiny_source, tmp_path, name):
    path, mark = shutil.copytree(tiny_source, tmp_path / "model"), tmp_path / "executed"
    if name == "pytorch_model.bin":
        (path / SINGLE).unlink()
    (path / name).write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ValueError, match=r"got only pickled ones|expected JSON|header"):
        open_checkpoint(str(path))
    assert not mark.exists()
    pickle.loads((path / name).read_bytes())
    assert mark.exists()


OUTSIDE = ("../x.safetensors", "/x.safetensors", "a/x.safetensors", "..", "a\\x.safetensors", "x.safetensors\0", "",
           ".x.safetensors", "~/x.safetensors", "x.safetensors/..", "\u2025/x.safetensors")  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_in_an_index_leaves_the_directory(tiny_source, tmp_path, name):
    path = shutil.copytree(tiny_source, tmp_path / "model")
    shutil.copy(path / SINGLE, tmp_path / "x.safetensors")
    (path / SINGLE).rename(path / "y.safetensors")
    names = open_checkpoint(str(tiny_source)).tensors
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    with pytest.raises(ValueError, match=r"weight_map.*: expected the name of a safetensors file in this directory"):
        open_checkpoint(str(path))


OUTSIDE_SUMS = ("../outside", "/etc/passwd", "a/../../outside", "a/..", "..", ".", "a/./b", "a//b", "a/", "./outside")


@pytest.mark.parametrize("name", OUTSIDE_SUMS)
def test_no_name_among_the_checksums_leaves_the_directory(tiny_checkpoint, tmp_path, name):
    path = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (tmp_path / "outside").touch()
    with (path / SUMS).open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(ValueError, match="expected lines of a SHA-256 sum and a file name"):
        validate(str(path))


def test_no_link_in_a_source_brings_a_secret_into_the_copy(tiny_source, tmp_path):
    path, secret = shutil.copytree(tiny_source, tmp_path / "model"), tmp_path / "home" / "credentials.json"
    secret.parent.mkdir()
    secret.write_text("a secret")
    for name in ("credentials.json", "LICENSE", "tokenization_x.py", "README.md"):
        (path / name).symlink_to(secret)
    (path / "templates").symlink_to(secret.parent)
    summary = convert(path, tmp_path / "out", bits=3, noise="analytic", quantizer="mse", group_size=32)
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file() and b"a secret" in file.read_bytes()]
    reason = "(a link out of the directory)"
    named = (f"LICENSE {reason}", f"credentials.json {reason}", "templates/", f"tokenization_x.py {reason}")
    assert summary.left == named


def test_links_of_the_hub_cache_are_followed(tiny_checkpoint, tmp_path):
    """There the files of a snapshot are links to blobs in a directory beside it."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(tiny_checkpoint.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    validate(str(snapshot))


@pytest.mark.parametrize("length", [header.MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_header_lengths_are_bounded(tmp_path, length):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length))
        # A file as long as that, which takes no room on the disk.
        file.truncate(min(length + 8, 2**32))
    with pytest.raises(ValueError, match=r"header length: expected at most 100000000 bytes, got"):
        header.read_header(path)
