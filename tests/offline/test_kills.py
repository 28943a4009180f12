"""Conversions that run the model and are killed: a kill costs at most one layer, or one part of the predictions."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from alphaq_vllm import convert
from offline.model.passes import Pass

DOCS_MOE = Path(__file__).parents[1] / "models" / "docs-moe"
WAYS = {
    # The text of GPTQ is also that of propagation.
    "one text": {"bits": 3.0, "calibration_tokens": 4096},
    # Each writes its own.
    "two texts": {"bits": 3.0, "calibration_tokens": 2048, "calibration_length": 64},
}
# Converts in a new process for each line of its input: where to, and when to be killed. It counts layers that are run
# and parts of the predictions that are drawn, and says how many of them there were, by their kind.
SERVER = """
import json, os, signal, sys
from pathlib import Path
from alphaq_vllm import convert
from offline import journal
from offline.layerwise import sequential
from offline.model import forward, passes, sampling
from tests.offline.test_kills import WAYS
import torch, transformers.models.qwen2_moe.modeling_qwen2_moe

torch.set_num_threads(1)
journal.SECONDS_BETWEEN_COMMITS = 0.0
sampling.MAX_PREDICTIONS = 2**20

def spy(module, name, kind, kill, pipe):
    function = getattr(module, name)
    def counted(*arguments, **options):
        os.write(pipe, kind)
        kill(name)
        return function(*arguments, **options)
    setattr(module, name, counted)

def converted(out, moment, delay, pipe):
    moments = iter(range(1, 10**6))
    def kill(name):
        if name == moment[0] and next(moments) == moment[1]:
            if not delay:
                os.kill(os.getpid(), signal.SIGKILL)
            # Ends a process that does not expect it.
            signal.setitimer(signal.ITIMER_REAL, delay)
    def kill_at_any(name):
        kill(name)
        kill("any")
    for module in (forward, sequential):
        spy(module, "route", b"l", kill_at_any, pipe)
        spy(module, "advance", b"l", kill_at_any, pipe)
    spy(sampling, "_draw", b"d", kill_at_any, pipe)
    commit = passes.Pass._commit
    def committed(self):
        kill("commit")
        commit(self)
    passes.Pass._commit = committed
    convert(sys.argv[1], Path(out), workers=1, resume=True, **WAYS[sys.argv[2]])

for line in sys.stdin:
    out, moment, delay = json.loads(line)
    reader, pipe = os.pipe()
    pid = os.fork()
    if not pid:
        sys.stderr = open(os.devnull, "w")
        converted(out, moment, delay, pipe)
        os._exit(0)
    os.close(pipe)
    status = os.waitpid(pid, 0)[1]
    work = os.fdopen(reader, "rb").read()
    print(json.dumps([os.WIFSIGNALED(status), status, work.decode()]), flush=True)
"""
NEVER = ["none", 0]


class Converter:
    """Conversions of a source in one of ``WAYS``, by ``SERVER``."""

    def __init__(self, source, way):
        command = [sys.executable, "-c", SERVER, str(source), way]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, out, moment=NEVER, delay=0.0):
        """Convert as far as it gets before a kill: whether it was killed, and what it did, ``l`` for every layer and
        ``d`` for every part of the predictions.
        """
        print(json.dumps([str(out), moment, delay]), file=self._server.stdin, flush=True)
        killed, status, work = json.loads(self._server.stdout.readline())
        assert killed or status == 0
        return killed, work

    def close(self):
        self._server.stdin.close()
        self._server.wait()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of three layers with small experts, the first without any."""
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=512, hidden_size=128, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2,
        shared_expert_intermediate_size=128, mlp_only_layers=[0],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("kills") / "source"
    transformers.Qwen2MoeForCausalLM(config).bfloat16().save_pretrained(path)
    return path


@pytest.fixture
def converter():
    """``converter(source, way)``, closed at the end."""
    made = []

    def make(*arguments):
        made.append(Converter(*arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


def digests(directory):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


@pytest.mark.parametrize(("point", "moments"), [("commit", (1, 3, 4, 6, 9, 11, 12, 14)), ("_draw", (1, 2, 4))])
def test_a_kill_costs_at_most_one_layer_or_one_part_of_the_predictions(source, converter, tmp_path, point, moments):
    """Killed when the most is lost, in every pass: all of a layer is done and nothing of it is kept."""
    server = converter(source, "one text")
    _, work = server.run(tmp_path / "whole")
    # Two passes for the text, one for the errors, and one of GPTQ.
    assert work == "llldd" * 2 + "lll" * 2
    whole = digests(tmp_path / "whole")
    for moment in moments:
        out = tmp_path / str(moment)
        killed, before = server.run(out, [point, moment])
        assert killed
        assert not out.exists()
        kept = list((tmp_path / f"{moment}.partial" / "kept").glob("*"))
        assert len(kept) <= 2
        assert sum(file.stat().st_size for file in kept) <= 2 * 4096 * 128 * 4
        killed, after = server.run(out)
        assert not killed
        assert len(before + after) <= len(work) + 1
        assert digests(out) == whole
    assert not server.run(tmp_path / "last", [point, moments[-1] + 1])[0]


@pytest.mark.parametrize("model_type", ["granitemoe", "gemma4_text", "nemotron_h", "glm_moe_dsa"])
def test_layers_of_all_kinds_go_on_from_what_is_kept(tiny_model, tmp_path, monkeypatch, model_type):
    """Layers that scale what comes out of their experts, that run twice, that differ, and that hand on more."""
    settings = {"bits": 3.0, "calibration_tokens": 1024, "calibration_length": 512, "workers": 1}
    convert(tiny_model(model_type), tmp_path / "whole", **settings)
    commit, seen = Pass._commit, set()

    def commit_and_interrupt(self):
        commit(self)
        if self.name not in seen:
            seen.add(self.name)
            raise KeyboardInterrupt

    monkeypatch.setattr(Pass, "_commit", commit_and_interrupt)
    # Both texts in two passes, the errors', and GPTQ's.
    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            convert(tiny_model(model_type), tmp_path / "out", **settings, resume=True)
    convert(tiny_model(model_type), tmp_path / "out", **settings, resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_case_16_conversions_killed_again_and_again_get_on_and_end_in_the_same_bytes(converter, tmp_path):
    """Each run begins two to four layers, or parts of the predictions, and is killed some time in the last of them."""
    server, random_ = converter(DOCS_MOE, "two texts"), random.Random(16)
    _, work = server.run(tmp_path / "whole")
    out, done, kills = tmp_path / "out", "", 0
    while True:
        killed, some = server.run(out, ["any", random_.randint(2, 4)], random_.uniform(1e-4, 0.02))
        done += some
        if not killed:
            break
        kills += 1
        # Every run gets one further, so this ends.
        assert len(done) <= len(work) + kills
    assert 4 < kills < len(work)
    assert digests(out) == digests(tmp_path / "whole")
