"""Real servers of a model that has nothing to do with AlphaQ, where AlphaQ is installed and lacks something of vLLM."""

import os
import re
import shutil
from pathlib import Path

import pytest

from alphaq_vllm.plugin._compat import RANGE
from benchmarks.server import vllm_server
from tests.conftest import MODEL
from tests.offline.conftest import save_tiny_model
from tests.serving.comparison import DTYPE, generate

HIDE = Path(__file__).with_name("hidden_interface.py")
ARGUMENTS = ["--dtype", DTYPE, "--enforce-eager", "--max-model-len", "64"]


@pytest.fixture
def no_interface(tmp_path, monkeypatch):
    """Servers of this process find AlphaQ by its entry point, and a vLLM without ``ExpertMapManager``."""
    plugin = tmp_path / "hidden_interface-0.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: hidden-interface\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{HIDE.stem} = {HIDE.stem}:register\n")
    paths = [str(tmp_path), str(HIDE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


def test_another_model_is_served_where_alphaq_lacks_an_interface(no_interface, tmp_path):
    """And ``--quantization alphaq`` is told what is missing."""
    model, log = tmp_path / "model", tmp_path / "log"
    save_tiny_model("llama", model)
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, model)
    with vllm_server(model, ARGUMENTS, log=log) as url:
        _, generated, logprobs = generate(url, [1, 5, 9, 13], max_tokens=4)
    assert len(generated) == 4 and logprobs.isfinite().all()
    # In the server, in its engine and in workers, and none of them says a word about AlphaQ.
    printed = log.read_text()
    assert len(set(re.findall(r"process (\d+) registers alphaq$", printed, re.MULTILINE))) >= 2
    assert not re.search("alphaq-vllm|vllm.alphaq|--quantization alphaq", printed)

    with pytest.raises(RuntimeError), vllm_server(model, [*ARGUMENTS, "--quantization", "alphaq"], log=log):
        pass
    last = log.read_text().splitlines()[-1]
    assert re.fullmatch(rf"ImportError: alphaq-vllm needs {RANGE}, got vLLM .*ExpertMapManager.*: install one.*", last)
