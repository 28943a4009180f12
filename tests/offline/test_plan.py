"""``alphaq plan``: what a model will take, before its weights are downloaded, from a stand-in for the Hub."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from alphaq_vllm import convert, plan
from tests.offline import hub as stand_in
from tests.offline.source.test_families import edit_config, edit_tensors, prediction_layer


@pytest.fixture
def hub():
    with stand_in.serve() as hub:
        yield hub


@pytest.fixture
def planned(hub, tmp_path):
    """``planned(*arguments)``: the status and the output or error of ``alphaq plan`` that uses the stand-in."""

    def call(*arguments):
        command = [sys.executable, "-m", "offline", "plan", *arguments]
        environment = hub.environment(tmp_path / "home")
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        return result.returncode, result.stdout or result.stderr

    return call


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def header_bytes(content):
    return 8 + int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("first_bytes", [2**17, 512], ids=["one request", "header longer than the first request"])
def test_plan_downloads_headers_alone(hub, planned, sharded_model, first_bytes, tmp_path, monkeypatch):
    files = files_of(sharded_model)
    # Weights that would show if they were downloaded, and others that nobody needs.
    shards = {name: content for name, content in files.items() if name.endswith(".safetensors")}
    assert all(len(content) > 2**17 for content in shards.values()) and len(shards) == 3
    commit = hub.commit("owner/model", {**files, "original/model.safetensors": b"x", "other.bin": bytes(2**20)})
    (tmp_path / "sitecustomize.py").write_text(
        f"import offline.source.outline as outline\noutline._FIRST_BYTES = {first_bytes}\n"
    )
    hub.environment = with_path(hub.environment, tmp_path)
    status, output = planned("owner/model", "--bits", "3", "--gpus", "2x24GiB", "--json")
    assert status == 0, output
    for name, content in shards.items():
        most = max(first_bytes, header_bytes(content) + first_bytes)
        assert header_bytes(content) <= hub.sent[name] <= most < len(content), name
    assert set(hub.sent) == {*shards, "config.json", "model.safetensors.index.json"}
    result = json.loads(output)
    assert (result["commit"], result["size"]) == (commit, sum(map(len, shards.values())))
    # As of the directory, but for what is measured here and now.
    here = plan(sharded_model, bits=3, gpus="2x24GiB")
    for differing in ("model", "commit", "seconds"):
        del result[differing], here[differing]
    assert result == json.loads(json.dumps(here))


def with_path(environment, folder):
    def changed(home):
        variables = environment(home)
        return {**variables, "PYTHONPATH": f"{folder}:{variables['PYTHONPATH']}"}

    return changed


def test_plan_stops_reading_where_the_hub_knows_no_ranges(hub, planned, tiny_model):
    hub.ranges = False
    hub.commit("owner/model", files_of(tiny_model("mixtral")))
    status, output = planned("owner/model")
    assert status == 0, output
    assert "family:     mixtral, covered; by default converted with propagated errors and gptq" in output


def test_plan_names_sizes_that_conversion_writes(tiny_model, tmp_path):
    result = plan(tiny_model("qwen2_moe"), bits=3, linear_bits=8, head_bits=4)
    options = {"mode": "uniform", "quantizer": "mse", "linear_bits": 8, "head_bits": 4}
    convert(tiny_model("qwen2_moe"), tmp_path / "out", bits=3, **options)
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    written = sum(tensor.nbytes for tensor in load_file(shard).values())
    assert {row["bits"]: row["size"] for row in result["budgets"]}[3] == written
    assert [row["bits"] for row in result["budgets"]] == [2.5, 3, 3.5, 4]


def test_plan_counts_layers_that_draft_as_conversion_writes_them(alphaq, tiny_model, tmp_path):
    source = shutil.copytree(tiny_model("glm4_moe"), tmp_path / "source")
    edit_config(source, num_nextn_predict_layers=1)
    edit_tensors(source, lambda tensors: tensors.update(prediction_layer("model.layers.2")))
    result = plan(source, bits=3, gpus="24GiB")
    assert (result["matrices"], result["drafts"], result["draft_bits"]) == (12, 12, 4)
    convert(source, tmp_path / "out", bits=3, mode="uniform", quantizer="mse")
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    assert result["budgets"][1]["size"] == sum(tensor.nbytes for tensor in load_file(shard).values())
    # What serves without drafting does not hold them.
    without = plan(tiny_model("glm4_moe"), bits=3, gpus="24GiB")
    assert result["serving"]["ways"][0]["weights"] == without["serving"]["ways"][0]["weights"]
    assert without["drafts"] == 0 and without["budgets"][1]["size"] < result["budgets"][1]["size"]
    assert "to draft:   12 expert matrices more, at 4 bits by default" in alphaq("plan", source)[1]
    assert "to draft" not in alphaq("plan", tiny_model("glm4_moe"))[1]


def test_plan_prints_a_table(alphaq, tiny_model):
    status, output, error = alphaq("plan", tiny_model("qwen2_moe"), "--bits", "2.25", "--gpus", "2x24GiB")
    assert (status, error) == (0, "")
    assert re.search(r"^   2\.25        2\.5 +[\d.]+ [KM]B +[\d.]+ [KM]B <$", output, re.MULTILINE)
    assert [line.split()[0] for line in output.splitlines() if re.match(r" +[\d.]+ ", line)] == [
        "2.25", "2.5", "3", "3.5", "4"
    ]  # fmt: skip
    assert re.search(r"tensor parallel +[\d.]+ KB of weights, 23\.2 GB left .*, at most [\d,]+ tokens$", output, re.M)
    assert re.search(r"expert parallel +[\d.]+ KB of weights, 23\.2 GB left .*, at most [\d,]+ tokens$", output, re.M)
    assert "download:   nothing, it is here" in output


def test_plan_says_why_a_model_is_not_covered(hub, planned, alphaq, model):
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps({**config, "num_experts": 9}))
    status, output, _ = alphaq("plan", model)
    assert status == 0
    assert f"{model}\ncannot be converted: model.layers.0.mlp: expected 9 experts as config.json says" in output
    (model / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert "model_type 'llama' is not in the table of families: read like qwen2_moe" in alphaq("plan", model)[1]
    (model / "config.json").write_text(json.dumps({**config, "model_type": "inkling_text"}))
    hub.commit("owner/other", files_of(model))
    status, output = planned("owner/other", "--json")
    result = json.loads(output)
    assert (status, result["covered"]) == (0, False)
    # The model is named, not the directory with its outline.
    assert result["reason"].startswith("owner/other: model_type")


def test_plan_tells_a_width_that_takes_smaller_groups(alphaq, model):
    path = model / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensors[name] = (tensor[:, :96] if "down_proj" in name else tensor[:96]).contiguous()
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 96}))
    status, output, _ = alphaq("plan", model, "--gpus", "2x1GiB")
    assert status == 0
    assert "groups:     32 columns: convert with --group-size 32" in output
    assert "tensor parallel  not possible: experts 96 wide cannot be shared by 2 ranks" in output
    assert "expert parallel  " in output


BAD = {
    "bits": (("--bits", "9"), r"--bits: expected an average width from 1 to 8, got '9'"),
    "gpus": (
        ("--gpus", "two"),
        "--gpus: expected a number of GPUs and the memory of each, .* got 'two'",
    ),
    "no gpu": (("--gpus", "0x24GiB"), "--gpus: expected a number of GPUs"),
    "revision": (("--revision", "v1"), "--revision: expected a model on the Hugging Face Hub, got the directory"),
}


@pytest.mark.parametrize("case", BAD)
def test_plan_refuses(alphaq, tiny_model, case):
    arguments, message = BAD[case]
    status, _, error = alphaq("plan", tiny_model("mixtral"), *arguments)
    assert status == 2
    assert re.search(message, error)


def test_plan_says_what_is_not_there(hub, planned, tmp_path):
    assert planned("nowhere/at/all") == (
        2, "error: nowhere/at/all: no such directory, and not a name on the Hugging Face Hub (owner/model)\n"
    )  # fmt: skip
    status, error = planned("owner/nothing")
    assert status == 2
    assert re.fullmatch(r"error: owner/nothing: no such directory, and the .* Hub did not deliver it: .*\n", error)
    hub.commit("owner/gguf", {"model.gguf": b"GGUF"})
    status, error = planned("owner/gguf")
    assert (status, error) == (
        2, "error: owner/gguf/config.json: no such file: expected the directory of a Hugging Face checkpoint\n"
    )  # fmt: skip
    status, error = planned("owner/gguf", "--revision", "v9")
    assert status == 2
    assert "did not deliver it at v9: " in error


def test_plan_refuses_pickled_weights_without_reading_them(hub, planned, model):
    (model / "model.safetensors").unlink()
    hub.commit("owner/pickled", {**files_of(model), "pytorch_model.bin": bytes(2**20)})
    status, output = planned("owner/pickled")
    assert status == 0
    assert "cannot be converted: owner/pickled: expected safetensors weights, got only pickled ones" in output
    assert hub.sent.keys() == {"config.json"}


def test_plan_refuses_a_header_that_lies(hub, planned, tiny_model):
    files = files_of(tiny_model("mixtral"))
    files["model.safetensors"] = (2**62).to_bytes(8, "little") + files["model.safetensors"][8:]
    hub.commit("owner/damaged", files)
    status, output = planned("owner/damaged")
    assert status == 0
    assert "cannot be converted: owner/damaged/model.safetensors: header length: expected at most" in output


def test_outlines_leave_nothing_behind(hub, planned, tiny_model, tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = hub.environment
    monkeypatch.setattr(hub, "environment", lambda home: {**environment(home), "TMPDIR": str(temporary)})
    hub.commit("owner/model", files_of(shutil.copytree(tiny_model("mixtral"), tmp_path / "copy")))
    assert planned("owner/model")[0] == 0
    assert list(temporary.iterdir()) == []
