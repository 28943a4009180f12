"""Models by name: uploaded to a stand-in for the Hugging Face Hub by its real client, and taken from there."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from alphaq_vllm import convert, upload, validate
from alphaq_vllm.checksums import SUMS
from tests.offline import hub as stand_in

QUICK = ("--bits", "3", "--noise", "analytic", "--quantizer", "mse")


@pytest.fixture(scope="module")
def hub():
    with stand_in.serve() as hub:
        yield hub


@pytest.fixture
def alphaq_with(hub, tmp_path):
    """``alphaq_with(*arguments, **environment)``: the exit status, standard output and error of a command that uses
    the stand-in.
    """

    def call(*arguments, **environment):
        command = [sys.executable, "-m", "offline", *map(str, arguments)]
        environment = {**hub.environment(tmp_path / "home"), **environment}
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        return result.returncode, result.stdout, result.stderr

    return call


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A checkpoint with files of odd names, not to be changed."""
    source = shutil.copytree(tiny_model("qwen2_moe"), tmp_path_factory.mktemp("source") / "model")
    for name in ODD:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    folder = tmp_path_factory.mktemp("finished")
    convert(source, folder / "out", bits=3, noise="analytic", quantizer="mse")
    return (folder / "out").rename(folder / "out [1] ü")


ODD = ("a b.txt", "[1]*.txt", "模型.txt", f"{'n' * 246}.txt", "additional_chat_templates/to ol[s].jinja", "-x.txt")


def files_of(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_upload_puts_every_file_on_the_hub_whatever_its_name(hub, alphaq_with, finished):
    status, output, error = alphaq_with("upload", finished, "owner/odd-names")
    assert (status, error) == (0, "")
    assert set(ODD) <= set(files_of(finished))
    assert hub.repos["owner/odd-names"][-1] == {".gitattributes": b"", **files_of(finished)}
    commit = f"{hub.url}/owner/odd-names/commit/{hub.sha('owner/odd-names', 1)}"
    assert output.startswith(f"{commit}: {len(files_of(finished))} files, ")


def test_upload_to_a_repository_that_exists_adds_to_it(hub, alphaq_with, finished, tmp_path):
    hub.commit("owner/existing", {"picture.png": b"p", "README.md": b"old"})
    long = shutil.copytree(finished, tmp_path / ("n" * 250))
    assert alphaq_with("upload", long, "owner/existing")[0] == 0
    assert hub.repos["owner/existing"][-1] == {"picture.png": b"p", **files_of(finished)}


def test_what_was_uploaded_is_whole_when_it_comes_back(hub, alphaq_with, finished, tmp_path):
    """What was edited has its new sum there; what was added stays here and is named."""
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "README.md").write_text("My own card.")
    (out / "notes").mkdir()
    (out / "notes" / "private.txt").write_text("secret")
    status, output, error = alphaq_with("upload", out, "owner/edited", "--json")
    assert status == 0, error
    assert json.loads(output)["left"] == ["notes/private.txt"]
    files = hub.repos["owner/edited"][-1]
    assert files["README.md"] == b"My own card." and "notes/private.txt" not in files
    assert (out / SUMS).read_bytes() == (finished / SUMS).read_bytes() != files[SUMS]
    status, output, error = alphaq_with("validate", "owner/edited")
    assert status == 0, error


def test_upload_refuses_what_is_damaged_before_it_asks_the_hub(finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "tokenizer.json").write_text("{}")
    with (out / SUMS).open("a") as sums:
        sums.write(f"{'0' * 64}  tokenizer.json\n")
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    with pytest.raises(ValueError, match=r"expected the contents that .* states, got others in tokenizer\.json"):
        upload(out, "owner/name")


def test_upload_refuses_what_is_no_checkpoint(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="got one that is not quantized: convert it first"):
        upload(tiny_model("qwen2_moe"), "owner/name")
    with pytest.raises(FileNotFoundError, match="expected the directory of an AlphaQ checkpoint, got none"):
        upload(tmp_path / "nothing", "owner/name")


NAMES = (
    "name",
    "owner/na me",
    "owner/[1]",
    "owner/ü",
    "o/" + "n" * 250,
    "a/b/c",
    "owner/--x--",
    "../x",
    "",
    "owner/a.git",
)


@pytest.mark.parametrize("name", NAMES)
def test_upload_refuses_a_name_that_the_hub_does_not_take(finished, name):
    with pytest.raises(ValueError, match=r"^repo: expected owner/name of at most 96 letters.*, got '"):
        upload(finished, name)


def test_upload_says_what_to_do_without_a_token(alphaq_with, finished):
    status, _, error = alphaq_with("upload", finished, "owner/refused", HF_TOKEN="hf_wrong")
    assert status == 2
    assert re.fullmatch(r"error: owner/refused: the Hugging Face Hub did not take it: .*401.*: log in with .*\n", error)


def test_upload_says_that_the_hub_cannot_be_reached(alphaq_with, finished):
    status, _, error = alphaq_with("upload", finished, "owner/name", HF_ENDPOINT="http://127.0.0.1:9")
    assert status == 2
    assert re.fullmatch(r"error: owner/name: the Hugging Face Hub did not take it: .*refused.*\n", error)


def test_private_makes_a_private_repository_and_refuses_a_public_one(hub, alphaq_with, finished):
    assert alphaq_with("upload", finished, "owner/hidden", "--private")[0] == 0
    assert "owner/hidden" in hub.private
    hub.commit("owner/public", {"a": b""})
    status, _, error = alphaq_with("upload", finished, "owner/public", "--private")
    assert (status, len(hub.repos["owner/public"])) == (2, 1), error
    assert "owner/public: expected a private repository, got one that others can read" in error


def test_case_11_revision_takes_a_model_at_a_tag_or_a_commit(hub, alphaq_with, tiny_model, tmp_path):
    """The card has the model's name, and its commit."""
    files = files_of(tiny_model("qwen2_moe"))
    first = hub.commit("owner/model", {**files, "LICENSE": b"old", "original/params.json": b"{}", "model.gguf": b""})
    hub.tags["owner/model", "v1"] = first
    second = hub.commit("owner/model", {"LICENSE": b"new"})
    for out, licence, sha, options in (
        ("tag", "old", first, ("--revision", "v1")),
        ("commit", "old", first, ("--revision", first)),
        ("main", "new", second, ()),
    ):
        status, output, error = alphaq_with("convert", "owner/model", tmp_path / out, *QUICK, *options)
        assert status == 0, error
        assert "left behind:    .gitattributes" not in output
        assert "left behind:    model.gguf, original/" in output
        assert (tmp_path / out / "LICENSE").read_text() == licence
        card = (tmp_path / out / "README.md").read_text()
        assert "\nbase_model: owner/model\n" in card and "\n# owner/model, quantized with" in card
        assert f"from commit `{sha}`" in card
    status, output, error = alphaq_with("validate", tmp_path / "tag", "--source", "owner/model", "--revision", "v1")
    assert (status, "everything else is equal to the source" in output) == (0, True), error
    # The main branch has other weights since.
    hub.commit("owner/model", {"config.json": files_of(tiny_model("olmoe"))["config.json"]})
    assert alphaq_with("validate", tmp_path / "tag", "--source", "owner/model")[0] == 2
    assert alphaq_with("validate", tmp_path / "tag", "--source", "owner/model", "--revision", first)[0] == 0


def test_case_11_a_snapshot_directory_goes_by_the_name_of_its_model(hub, alphaq_with, tiny_model, tmp_path):
    sha = hub.commit("owner/by-directory", files_of(tiny_model("qwen2_moe")))
    assert alphaq_with("measure", "owner/by-directory", "-o", "a.csv", "--noise", "analytic")[0] == 0
    snapshot = tmp_path / "home" / "hub" / "models--owner--by-directory" / "snapshots" / sha
    summary = convert(snapshot, tmp_path / "out", bits=3, noise="analytic", quantizer="mse")
    assert summary.left == ()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nbase_model: owner/by-directory\n" in card and "\n# owner/by-directory, quantized with" in card
    assert validate(tmp_path / "out", source=snapshot)["matrices"] == 24


def test_code_and_weights_that_settings_name_are_downloaded_too(hub, alphaq_with, tiny_model, tmp_path):
    beside = {
        "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["modeling_x.T", null]}}',
        "modeling_x.py": b"from .configuration_x import C\n",
        "configuration_x.py": b"from .deep import D\n",
        "deep.py": b"",
        "other.py": b"",
        "modules.json": b'[{"path": "Dense [1]", "type": "x.Dense"}]',
        "Dense [1]/model.safetensors": b"weights",
    }
    hub.commit("owner/code", files_of(tiny_model("qwen2_moe")) | beside | {"backup/model.safetensors": b"x"})
    status, output, error = alphaq_with("convert", "owner/code", tmp_path / "out", *QUICK)
    assert status == 0, error
    assert "code:           configuration_x.py, deep.py, modeling_x.py: taken along" in output
    assert "left behind:    backup/, other.py\n" in output
    assert not [path for path in hub.requests if path.endswith(("/other.py", "/backup/model.safetensors"))]
    del beside["other.py"]
    assert {name: files_of(tmp_path / "out").get(name) for name in beside} == beside
    assert alphaq_with("upload", tmp_path / "out", "owner/code-alphaq")[0] == 0
    status, _, error = alphaq_with("validate", "owner/code-alphaq")
    assert status == 0, error


def test_without_the_hub_what_a_snapshot_lacks_is_named(hub, alphaq_with, tiny_model, tmp_path):
    """Another program has downloaded the model, and only what it needs itself."""
    beside = {"USE_POLICY.md": b"Be kind.", "own.py": b"", "templates/a.jinja": b"{}", "model.gguf": b""}
    beside["tokenizer_config.json"] = b'{"auto_map": {"AutoTokenizer": ["own.T", null]}}'
    hub.commit("owner/part", files_of(tiny_model("qwen2_moe")) | beside)
    code = "import huggingface_hub as h; h.snapshot_download('owner/part', allow_patterns=['*.json', '*.safetensors'])"
    environment = hub.environment(tmp_path / "home")
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    asked = len(hub.requests)
    status, output, error = alphaq_with("convert", "owner/part", tmp_path / "out", *QUICK, HF_HUB_OFFLINE="1")
    assert (status, len(hub.requests)) == (0, asked), error
    assert "left behind:    USE_POLICY.md (not in the cache), model.gguf, own.py, templates/\n" in output
    status, output, error = alphaq_with("convert", "owner/part", tmp_path / "second", *QUICK)
    assert status == 0, error
    assert "left behind:    model.gguf\n" in output
    status, output, error = alphaq_with("convert", "owner/part", tmp_path / "third", *QUICK, HF_HUB_OFFLINE="1")
    assert status == 0, error
    assert "left behind:    model.gguf\n" in output


def test_case_11_a_revision_that_the_hub_lacks_is_named_in_one_line(hub, alphaq_with, tiny_model, tmp_path):
    hub.commit("owner/one", files_of(tiny_model("qwen2_moe")))
    status, _, error = alphaq_with("convert", "owner/one", tmp_path / "out", *QUICK, "--revision", "v9")
    assert status == 2
    assert re.fullmatch(r"error: owner/one: .* did not deliver it at v9: .*Revision Not Found.*\n", error)


def test_case_11_a_revision_is_of_a_model_on_the_hub(alphaq, tiny_model, tmp_path):
    status, _, error = alphaq("convert", tiny_model("qwen2_moe"), tmp_path / "out", "--revision", "v1")
    assert status == 2
    assert "error: --revision: expected a model on the Hugging Face Hub, got the directory " in error
    status, _, error = alphaq("validate", tmp_path, "--revision", "v1")
    assert (status, "error: --revision: expected it with --source, whose it is, got 'v1' alone" in error) == (2, True)
    status, _, error = alphaq("measure", "owner/model", "-o", tmp_path / "a", "--revision", "")
    assert "error: --revision: expected a branch, a tag or a commit, got ''" in error
