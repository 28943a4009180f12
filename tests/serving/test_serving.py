"""Real servers of several ranks, and ones that must not start, on the embedded model."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from alphaq_vllm.checksums import SUMS
from benchmarks.fidelity import measure
from benchmarks.server import vllm_server
from tests.serving.comparison import TEXT, TWO_RANKS_ON_CPUS

TWO_RANKS = ["--tensor-parallel-size", "2"]
EXPERT_PARALLEL = [*TWO_RANKS, "--enable-expert-parallel"]
DATA_PARALLEL = ["--data-parallel-size", "2"]
QUANTIZATION = ["--quantization", "alphaq"]


on_cpus = pytest.mark.skipif(torch.cuda.is_available(), reason="for CPUs; GPUs have a test of their own")


@on_cpus
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([*TWO_RANKS, "--enforce-eager"], id="tensor-parallel"),
        pytest.param(EXPERT_PARALLEL, id="expert-parallel-compiled", marks=pytest.mark.long),
    ],
)
def test_ranks_give_the_log_probabilities_of_the_dequantized_model(mixed_checkpoint, tmp_path, arguments):
    result = measure(mixed_checkpoint, TEXT, 2048, "float32", arguments, work=tmp_path, environment=TWO_RANKS_ON_CPUS)
    assert result.tokens > 2000
    assert result.max_abs_difference <= 0.001


@on_cpus
@pytest.mark.long
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--pipeline-parallel-size", "2"], id="pipeline-parallel"),
        pytest.param(DATA_PARALLEL, id="data-parallel-experts-split"),
        pytest.param([*DATA_PARALLEL, "--enable-expert-parallel"], id="data-parallel-attention"),
    ],
)
def test_ranks_that_vllm_does_not_support_on_cpus(mixed_checkpoint, tmp_path, arguments):
    plugin = tmp_path / "parallel_on_cpus-0.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: parallel-on-cpus\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\nparallel_on_cpus = parallel_on_cpus:register\n")
    paths = [str(tmp_path), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**TWO_RANKS_ON_CPUS, "PYTHONPATH": os.pathsep.join(paths)}
    arguments = ["--enforce-eager", *arguments]
    result = measure(mixed_checkpoint, TEXT, 2048, "float32", arguments, work=tmp_path, environment=environment)
    assert result.tokens > 2000
    assert result.max_abs_difference <= 0.001


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--enforce-eager"], id="eager"),
        pytest.param(["-cc.cudagraph_mode=PIECEWISE"], id="piecewise-graphs"),
        pytest.param(["-cc.cudagraph_mode=FULL"], id="full-graphs"),
        pytest.param(TWO_RANKS, id="tensor-parallel"),
        pytest.param(EXPERT_PARALLEL, id="expert-parallel"),
        pytest.param([*EXPERT_PARALLEL, "--expert-placement-strategy", "round_robin"], id="round-robin"),
        pytest.param(["--pipeline-parallel-size", "2"], id="pipeline-parallel"),
        pytest.param([*DATA_PARALLEL, "--enable-expert-parallel"], id="data-parallel-attention"),
    ],
)
def test_gpus_give_the_log_probabilities_of_the_dequantized_model(mixed_checkpoint, tmp_path, arguments):
    if torch.cuda.device_count() < (2 if "2" in arguments else 1):
        pytest.skip("needs 2 GPUs")
    result = measure(mixed_checkpoint, TEXT, 2048, "float16", arguments, work=tmp_path)
    assert result.tokens > 2000
    assert result.mean_abs_difference <= 0.01
    assert result.perplexity_served == pytest.approx(result.perplexity_reference, rel=0.005)


def damaged(checkpoint, folder, change):
    """A copy of the checkpoint with its tensors changed by ``change(tensors)``, and no checksums that would tell."""
    copy = Path(shutil.copytree(checkpoint, folder / "damaged"))
    (copy / SUMS).unlink()
    (shard,) = copy.glob("*.safetensors")
    with safe_open(shard, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, shard, {"format": "pt"})
    (copy / "model.safetensors.index.json").unlink(missing_ok=True)
    return copy


NAME = "model.layers.1.mlp.experts.2.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    # tests/reliability/test_loading.py has every lie, without servers.
    [
        pytest.param(
            lambda tensors: tensors.pop(f"{NAME}.weight_scale"),
            f"{NAME}.weight_scale: expected in the checkpoint, got nothing",
            id="missing-scale",
        ),
        pytest.param(
            lambda tensors: tensors[f"{NAME}.weight_scale"].fill_(float("nan")),
            f"{NAME}.weight_scale: expected finite values",
            id="nan",
            marks=pytest.mark.long,
        ),
        pytest.param(
            lambda tensors: tensors.update({f"{NAME}.weight_packed": tensors[f"{NAME}.weight_packed"][:, 1:].clone()}),
            f"{NAME}.weight_packed: expected torch.int32 of shape",
            id="bit-map-disagrees",
            marks=pytest.mark.long,
        ),
    ],
)
def test_server_refuses_a_checkpoint_that_lies(mixed_checkpoint, tmp_path, change, message):
    copy = damaged(mixed_checkpoint, tmp_path, change)
    log = tmp_path / "log"
    with (
        pytest.raises(RuntimeError, match="vllm serve ended with status"),
        vllm_server(copy, [*QUANTIZATION, "--enforce-eager"], log=log),
    ):
        pass
    assert message in log.read_text()


@pytest.mark.long
def test_server_refuses_a_checkpoint_with_a_flipped_bit(mixed_checkpoint, tmp_path):
    copy = Path(shutil.copytree(mixed_checkpoint, tmp_path / "flipped"))
    (shard,) = copy.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    log = tmp_path / "log"
    with (
        pytest.raises(RuntimeError, match="vllm serve ended with status"),
        vllm_server(copy, [*QUANTIZATION, "--enforce-eager"], log=log),
    ):
        pass
    assert f"expected the contents that {SUMS} states, got others in {shard.name}: copy it again" in log.read_text()
