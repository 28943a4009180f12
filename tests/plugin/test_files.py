"""The files of a checkpoint are compared with their sums before vLLM loads anything of them."""

import json
import shutil

import pytest

from alphaq_vllm import convert
from alphaq_vllm.checksums import SUMS
from alphaq_vllm.format import AlphaQSpec
from alphaq_vllm.plugin import files
from alphaq_vllm.plugin.config import AlphaQConfig
from alphaq_vllm.plugin.files import VERIFY, check_files


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("files") / "out"
    convert("tests/models/docs-moe", out, bits=2.0, mode="uniform", quantizer="rtn")
    return out


@pytest.fixture
def copy(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "copy")


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


def serve(path):
    """What vLLM asks of the config before it starts its workers."""
    AlphaQConfig(AlphaQSpec(128, {})).maybe_update_config(str(path))


def test_a_checkpoint_as_it_was_written_is_served(converted):
    serve(converted)


def test_case_9_a_flipped_bit_in_what_is_loaded_is_refused(converted, copy):
    editable = {"README.md", "generation_config.json", "tokenizer_config.json", "alphaq_stats.csv"}
    names = sorted(file.name for file in converted.iterdir() if file.name not in editable)
    assert {"config.json", "tokenizer.json", SUMS} < set(names)
    for name in names:
        # The first sum is of the card, which people edit.
        for place in (0 if name != SUMS else -2, (copy / name).stat().st_size // 2, -1):
            flip(copy / name, place)
            check_files.cache_clear()
            with pytest.raises(ValueError, match=f"{SUMS}.* or set ALPHAQ_VERIFY=off if it was changed on purpose"):
                serve(copy)
            shutil.copy(converted / name, copy / name)


def test_a_file_that_is_gone_or_was_added_is_refused(copy):
    (shard,) = copy.glob("*.safetensors")
    shutil.copy(shard, copy / "more.safetensors")
    with pytest.raises(ValueError, match="expected a sum for every file of the checkpoint, got none for more"):
        serve(copy)
    (copy / "more.safetensors").unlink()
    shard.unlink()
    with pytest.raises(ValueError, match=f"expected all files of {SUMS}, got no {shard.name}"):
        serve(copy)


def test_case_9_what_people_edit_is_served_with_a_warning(copy, monkeypatch):
    warnings = []
    monkeypatch.setattr(files.logger, "warning", lambda text, *values: warnings.append(text % values))
    (copy / "README.md").write_text("# Ours\n")
    (copy / "generation_config.json").unlink()
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    settings = json.loads((copy / "tokenizer_config.json").read_bytes())
    (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    serve(copy)
    changed = "generation_config.json, README.md, tokenizer_config.json"
    assert warnings == [f"{copy}: served although changed since the conversion: {changed}"]


@pytest.mark.parametrize("name", ["additional_chat_templates/tool_use.jinja", "chat_template.json", "USE_POLICY.md"])
def test_case_9_templates_and_policies_are_served_with_a_warning(tmp_path, monkeypatch, name):
    """Wherever a model keeps its templates."""
    warnings = []
    monkeypatch.setattr(files.logger, "warning", lambda text, *values: warnings.append(text % values))
    source = shutil.copytree("tests/models/docs-moe", tmp_path / "source")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text('{"chat_template": "{{ messages }}"}')
    convert(source, tmp_path / "out", bits=2.0, mode="uniform", quantizer="rtn")
    (tmp_path / "out" / name).write_text('{"chat_template": "{{ tools }}"}')
    serve(tmp_path / "out")
    assert warnings == [f"{tmp_path / 'out'}: served although changed since the conversion: {name}"]


def test_what_was_changed_on_purpose_is_served(copy, monkeypatch):
    flip(copy / "config.json", 5)
    monkeypatch.setenv(VERIFY, "0")
    serve(copy)


def test_a_checkpoint_without_sums_is_served_with_a_warning(copy, monkeypatch):
    warnings = []
    monkeypatch.setattr(files.logger, "warning", lambda text, *values: warnings.append(text % values))
    (copy / SUMS).unlink()
    serve(copy)
    assert warnings == [f"{copy} has no {SUMS}: AlphaQ cannot tell whether its files are damaged"]


def test_a_name_on_the_hub_is_left_to_the_hubs_client():
    serve("someone/some-model")
