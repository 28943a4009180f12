"""Files beside the model, and code that the config names: what a copy takes along, and what stays behind."""

import json
import os

import pytest

from offline.source import beside
from offline.source.beside import look_beside


@pytest.fixture
def lay(tmp_path):
    """``lay(*names)``: what lies beside the weights, when files of these names do."""
    directory = tmp_path / "model"
    directory.mkdir()

    def make(*names, **contents):
        for name in names:
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(contents.get(name, "{}"))
        (directory / "model.safetensors").touch()
        return look_beside(directory, [directory / "model.safetensors"])

    make.directory = directory
    return make


def taken(found):
    return [name for name, _ in found.taken]


TAKEN = (
    "USE_POLICY", "USE_POLICY.md", "Notice", "LICENSE", "LICENSE.pdf", "license.txt", "Licence", "tokenizer.model.v3",
    "tokenizer.model.v11", "tekken.json", "vocab.bpe", "merges.txt", "chat_template.jinja", "qwen.tiktoken",
    "additional_chat_templates/tool use.jinja", "modules.json", "1_Pooling/config.json", "a/b/template.jinja",
)  # fmt: skip
LEFT = (
    "model.gguf", "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "tf_model.h5",
    "optimizer.pt", "training_args.bin", "flax_model.msgpack", "tokenizer.onnx", "picture.png", ".env", ".secret.json",
    "modeling_x.py", "configuration_x.py", "setup.py",
)  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_files_beside_the_model_are_taken_along(lay, name):
    found = lay(name)
    assert (taken(found), found.left) == ([name], ())


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_taken_along_is_named(lay, name):
    found = lay(name)
    assert (taken(found), found.left) == ([], (name,))


FOREIGN = (
    "original/params.json", "original/consolidated.00.pth", ".git/config.json", ".cache/huggingface/x.json",
    "checkpoint-500/tokenizer.json", "onnx/model.onnx", "runs/a/b.json", "__pycache__/tokenization.py", "images/a.png",
)  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_folder_stays_behind_and_is_named_once(lay, name):
    folder = name.partition("/")[0]
    found = lay(name, f"{folder}/sub/picture.png")
    assert (taken(found), found.left) == ([], (f"{folder}/",))


def test_a_folder_with_weights_stays_behind_whole(lay):
    found = lay("backup/model.safetensors", "backup/config.json", "backup/deep/tokenizer.json")
    assert (taken(found), found.left) == ([], ("backup/",))


def test_weights_of_a_module_are_taken_along(lay):
    modules = json.dumps([{"path": "", "type": "a.T"}, {"path": "2_Dense", "type": "a.Dense"}, {"path": 3}, None])
    found = lay(
        "modules.json", "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin",
        **{"modules.json": modules},
    )  # fmt: skip
    assert taken(found) == ["2_Dense/config.json", "2_Dense/model.safetensors", "modules.json"]
    assert found.left == ("2_Dense/pytorch_model.bin",)


@pytest.mark.parametrize("content", ["[", "[" * 100_000, '{"a": 1}', '[{"path": ["x"]}]', '[{"path": "../../x"}]'])
def test_modules_that_make_no_sense_name_no_folder(lay, content):
    found = lay("modules.json", "x/model.safetensors", **{"modules.json": content})
    assert (taken(found), found.left) == (["modules.json"], ("x/",))


def test_code_that_settings_name_is_taken_along_and_what_it_imports(lay):
    auto_map = {"AutoTokenizer": ["hub_tok.Slow", None], "AutoProcessor": "elsewhere/repo--other.P"}
    found = lay(
        "tokenizer_config.json", "hub_tok.py", "helper.py", "second.py", "other.py", "modeling_x.py",
        **{
            "tokenizer_config.json": json.dumps({"auto_map": auto_map}),
            "hub_tok.py": "raise SystemExit\n    from .helper import a\nfrom . import second\nimport other\n",
            "helper.py": "from .hub_tok import b\n",
        },
    )  # fmt: skip
    assert found.code == ("helper.py", "hub_tok.py", "second.py")
    assert found.left == ("modeling_x.py", "other.py")


def test_code_of_the_model_is_not_taken_along_and_that_of_the_tokenizer_is(lay):
    named = {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M", "AutoTokenizer": ["t.T", None]}
    found = lay("config.json", "c.py", "m.py", "t.py", **{"config.json": json.dumps({"auto_map": named})})
    assert (found.code, found.left) == (("t.py",), ("c.py", "m.py"))


@pytest.mark.parametrize("name", ["tokenization_x.py", "image_processing_x.py", "encoding/encoding_x.py"])
def test_code_whose_name_says_that_it_makes_input_is_taken_along(lay, name):
    found = lay(name)
    assert found.code == (name,)
    assert taken(found) == [name]


@pytest.mark.parametrize("content", ["[]", '{"auto_map": 3}', '{"auto_map": {"A": {"b": "x.C"}}}', "\udcff"])
def test_settings_that_make_no_sense_name_no_code(lay, content):
    (lay.directory / "tokenizer_config.json").write_bytes(content.encode(errors="surrogateescape"))
    found = lay("x.py")
    assert (found.code, found.left) == ((), ("x.py",))


def test_a_large_file_stays_behind(lay, monkeypatch):
    monkeypatch.setattr(beside, "MAX_BYTES", 1_000_000)
    with (lay.directory / "data.json").open("wb") as file:
        file.truncate(1_000_001)
    found = lay("small.json")
    assert (taken(found), found.left) == (["small.json"], ("data.json (larger than 1 MB)",))


@pytest.mark.parametrize("name", ["credentials.json", "LICENSE", "tokenization_x.py", "chat/template.jinja"])
def test_a_link_out_of_the_directory_is_not_followed(lay, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    (lay.directory / name).parent.mkdir(exist_ok=True)
    (lay.directory / name).symlink_to(tmp_path / "secret")
    found = lay("chat/other.jinja")
    assert taken(found) == ["chat/other.jinja"]
    assert found.left == (f"{name} (a link out of the directory)",)


def test_a_link_to_a_folder_is_not_followed(lay, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.json").touch()
    (lay.directory / "templates").symlink_to(tmp_path / "outside")
    found = lay()
    assert (taken(found), found.left) == ([], ("templates/",))


def test_links_to_where_the_weights_lie_are_followed(tmp_path):
    """In the Hub's cache every file is a link to a directory with the contents of all; people make such directories
    by hand too.
    """
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "commit"
    blobs.mkdir()
    names = ("model.safetensors", "tokenizer.json", "additional_chat_templates/tools.jinja")
    for number, name in enumerate(names):
        (blobs / str(number)).write_text(name)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    found = look_beside(snapshot, [snapshot / "model.safetensors"])
    assert {name: path.read_text() for name, path in found.taken} == {name: name for name in names[1:]}
    assert found.left == ()


@pytest.mark.parametrize("link", ["nowhere", "loop.json"])
def test_a_link_that_leads_nowhere_stays_behind(lay, link):
    (lay.directory / "loop.json").symlink_to(link)
    assert lay().left == ("loop.json (not a file)",)


def test_a_pipe_is_not_opened(lay):
    os.mkfifo(lay.directory / "tokenizer.json")
    assert lay().left == ("tokenizer.json (not a file)",)


HOSTILE = {
    "a\nb.json": r"a\nb.json",
    "a\x1b[2J.txt": r"a\x1b[2J.txt",
    "a\\b.json": "a\\b.json",
    "\udcff.json": r"\udcff.json",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_cannot_be_printed_stays_behind_and_is_named_with_escapes(lay, name):
    found = lay(name)
    assert (taken(found), found.left) == (
        [],
        (f"{HOSTILE[name]} (a name with control characters or a backslash, or not in UTF-8)",),
    )


@pytest.mark.parametrize(
    "name", ["a b.json", "[1].json", "模型\u3000.txt", "👩\u200d💻.md", "é" * 125 + ".json", "-x.json", "'\"$(x).md"]
)
def test_odd_names_are_taken_along(lay, name):
    assert taken(lay(name)) == [name]
