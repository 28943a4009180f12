"""Conversions of models with files beside the weights, and with code that the config names."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from alphaq_vllm import convert, dequantize, validate
from alphaq_vllm.format import WEIGHTS_FILE
from offline.source.architectures import FAMILIES, without_code
from tests.offline.hub import Hub

QUICK = {"bits": 3.0, "noise": "analytic", "quantizer": "mse"}
TAKEN = {
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "tokenizer.model.v3": "vocabulary",
    "modules.json": '[{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]',
    "1_Pooling/config.json": '{"pooling_mode_lasttoken": true}',
    "USE_POLICY.md": "Be kind.",
    "LICENSE": "A licence.",
}
LEFT = {
    "original/params.json": "{}",
    "pytorch_model.bin": "",
    "model.gguf": "",
    "onnx/model.onnx": "",
    "modeling_x.py": "",
}
# A tokenizer whose class is in the checkpoint, and which leaves a file where it is run.
TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path("executed").touch()
class Special(PreTrainedTokenizerFast):
    special = True
"""
LOAD = """
import sys, alphaq_vllm.transformers, transformers
out = sys.argv[1]
config = transformers.AutoConfig.from_pretrained(out, trust_remote_code=True)
assert type(config) is transformers.Qwen2MoeConfig, config
model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
assert type(model) is transformers.Qwen2MoeForCausalLM, model
assert transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True).special
"""


def lay(directory, files):
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content)


@pytest.fixture
def source(speaking_model, tmp_path):
    """A model with a tokenizer, to be changed."""
    return shutil.copytree(speaking_model("qwen2_moe"), tmp_path / "source")


def test_case_6_files_beside_the_model_are_taken_along_and_the_rest_is_named(source, tmp_path, alphaq):
    lay(source, TAKEN | LEFT)
    out, plain = tmp_path / "out", tmp_path / "plain"
    summary = convert(source, out, **QUICK)
    assert dequantize(out, plain)["left"] == ()
    for copy in (out, plain):
        assert {name: (copy / name).read_text() for name in TAKEN} == TAKEN
        assert not [name for name in LEFT if (copy / name).exists()]
    assert summary.left == ("model.gguf", "modeling_x.py", "onnx/", "original/", "pytorch_model.bin")
    assert "left behind:    model.gguf, modeling_x.py, onnx/, original/, pytorch_model.bin\n" in str(summary)
    assert summary.total_size == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    sums = (out / "SHA256SUMS").read_text()
    assert all(f"  {name}\n" in sums for name in TAKEN)
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=False).returncode == 0
    assert validate(out, source=source)["files"] == len(sums.splitlines())
    (out / "1_Pooling" / "config.json").write_text("{}")
    status, _, error = alphaq("validate", out)
    assert (status, "got others in 1_Pooling/config.json" in error) == (2, True)


def test_case_5_out_loads_with_trust_remote_code_although_the_config_named_code(source, tmp_path):
    """The tokenizer's code is taken along, and not run before a user asks for it."""
    config = json.loads((source / "config.json").read_bytes())
    named = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"}
    (source / "config.json").write_text(json.dumps({**config, "auto_map": named}))
    settings = json.loads((source / "tokenizer_config.json").read_bytes())
    settings |= {"auto_map": {"AutoTokenizer": [None, "own_tokens.Special"]}, "tokenizer_class": "Special"}
    lay(source, {"tokenizer_config.json": json.dumps(settings), "own_tokens.py": TOKENIZER})
    lay(source, {"configuration_x.py": "raise SystemExit(9)", "modeling_x.py": "raise SystemExit(9)"})
    out = tmp_path / "out"
    summary = convert(source, out, **QUICK)
    written = json.loads((out / "config.json").read_bytes())
    assert {key: value for key, value in written.items() if key not in ("quantization_config", WEIGHTS_FILE)} == config
    assert summary.code == ("own_tokens.py",)
    assert "code:           own_tokens.py: taken along as files, never run" in str(summary)
    assert (
        "## Code\n\nTaken from the source as files, and never run by the conversion: `own_tokens.py`."
        in (out / "README.md").read_text()
    )
    assert validate(out, source=source)["matrices"] == 24
    assert not list(tmp_path.rglob("executed")) and not Path("executed").exists()
    environment = Hub().environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(out)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "executed").exists(), "the tokenizer's code came along, and is what transformers ran"


def test_transformers_or_vllm_has_every_family_without_code_from_a_checkpoint():
    families = {family.built_as or name for name, family in FAMILIES.items() if not family.own_code}
    # vLLM's own class of config, which cannot be asked here.
    assert families - set(CONFIG_MAPPING) == {"dots3_note"}
    # vLLM reads more of these than transformers' classes keep.
    assert {name for name, family in FAMILIES.items() if family.own_code} & set(CONFIG_MAPPING) == {
        "step3p7",
        "nemotron_h_omni",
    }


def test_case_5_the_code_of_a_config_comes_along_where_nobody_else_has_it(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model("bailing_moe"), tmp_path / "model")
    config = json.loads((model / "config.json").read_bytes())
    named = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"}
    (model / "config.json").write_text(json.dumps({**config, "auto_map": named}))
    lay(model, {"configuration_x.py": "from .sizes import N", "sizes.py": "N = 1", "modeling_x.py": "raise SystemExit"})
    summary = convert(model, tmp_path / "out", **QUICK)
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["auto_map"] == {
        "AutoConfig": "configuration_x.C"
    }
    assert summary.code == ("configuration_x.py", "sizes.py")
    assert summary.left == ("modeling_x.py",)
    assert "only the experts were checked" in summary.found


def test_case_5_code_is_dropped_from_nested_configs_too():
    nested = {"auto_map": {}, "text_config": {"auto_map": {"AutoConfig": "a.B"}, "hidden_size": 8}, "n": [1]}
    assert without_code(nested) == {"text_config": {"hidden_size": 8}, "n": [1]}


def test_a_directory_whose_name_cannot_be_printed_is_converted(source, tmp_path):
    odd = source.rename(tmp_path / "a\n# b\udcff")
    convert(odd, tmp_path / "out", **QUICK)
    assert "\n# a\\n# b\\udcff, quantized with AlphaQ" in (tmp_path / "out" / "README.md").read_text()


def test_an_interrupted_conversion_takes_up_files_in_folders(source, tmp_path, monkeypatch):
    lay(source, TAKEN)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("offline.operations.plan.render_sums", full)
        convert(source, tmp_path / "out", **QUICK)
    convert(source, tmp_path / "out", **QUICK, resume=True)
    assert {name: (tmp_path / "out" / name).read_text() for name in TAKEN} == TAKEN
