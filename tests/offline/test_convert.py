"""Conversion from end to end on tiny models, and every way in which it must refuse or stop."""

import errno
import hashlib
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from alphaq_vllm import convert
from alphaq_vllm.format import NO_WEIGHTS_FILE, WEIGHTS_FILE, AlphaQSpec
from offline import convert as command
from offline.cli import run
from offline.operations import plan
from offline.quantizers.quantize import quantize
from offline.writing import writer

QUICK = {"bits": 3.0, "noise": "analytic", "quantizer": "mse"}


def call(*arguments, monkeypatch):
    """Run the command in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        run(command.main)
    return caught.value.code


def stored(out):
    return {name: tensor for file in sorted(out.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def digests(directory):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def expert_names(source):
    return [name.removesuffix(".weight") for name in load_file(source / "model.safetensors") if ".experts." in name]


def every_width(source):
    return {name: 1 + i % 8 for i, name in enumerate(sorted(expert_names(source)))}


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral", "deepseek_v2"])
def test_convert_quantizes_the_experts_and_copies_the_rest(tiny_model, tmp_path, model_type):
    source, out = tiny_model(model_type), tmp_path / "out"
    convert(source, out, bit_map=every_width(source), quantizer="mse")
    originals, tensors = load_file(source / "model.safetensors"), stored(out)
    for name, num_bits in every_width(source).items():
        expected = quantize(originals.pop(f"{name}.weight").float(), num_bits, 64)
        assert torch.equal(tensors.pop(f"{name}.weight_packed"), expected.packed)
        assert torch.equal(tensors.pop(f"{name}.weight_scale"), expected.scale)
        assert torch.equal(tensors.pop(f"{name}.weight_grid"), expected.grid)
    assert tensors.keys() == originals.keys()
    for name, tensor in originals.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_convert_writes_the_config_with_the_bit_map_and_copies_sidecars(model, tmp_path):
    (model / "tokenizer.json").write_text('{"a": 1}')
    (model / "modeling.py").write_text("raise SystemExit")
    bits = every_width(model)
    convert(model, tmp_path / "out", bit_map=bits, group_size=64, quantizer="mse")
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    spec = AlphaQSpec.from_dict(config.pop("quantization_config"))
    assert config.pop(WEIGHTS_FILE) == NO_WEIGHTS_FILE
    assert config == json.loads((model / "config.json").read_bytes())
    assert spec.group_size == 64
    assert bits == {
        f"{module}.{expert}.{projection}": width
        for module, projections in spec.num_bits.items()
        for projection, widths in projections.items()
        for expert, width in enumerate(widths)
    }
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md",
        "SHA256SUMS",
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    }
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'


@pytest.mark.parametrize("noise", ["measured", "analytic"])
def test_convert_keeps_to_the_budget(tiny_model, tmp_path, noise):
    summary = convert(tiny_model("qwen2_moe"), tmp_path / "out", bits=3.5, noise=noise, quantizer="mse")
    assert 3.45 < summary.bits <= 3.5
    assert sum(summary.widths.values()) == 24
    assert set(summary.widths) <= {2, 3, 4}
    assert summary.gap < 1e-3


def test_convert_gives_more_bits_to_heavier_tails(model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    heavy = "model.layers.1.mlp.experts.2.up_proj"
    torch.manual_seed(0)
    spectrum = torch.arange(1, 129).pow(-1.5)
    orthogonal = torch.linalg.qr(torch.randn(128, 128))[0]
    weight = orthogonal @ torch.diag(spectrum) @ orthogonal.T
    tensors[f"{heavy}.weight"] = (weight * 0.02 / weight.std()).bfloat16()
    save_file(tensors, model / "model.safetensors")
    convert(model, tmp_path / "out", bits=2.2, gamma=8.0, noise="analytic", quantizer="mse")
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    spec = AlphaQSpec.from_dict(config["quantization_config"])
    assert spec.num_bits["model.layers.1.mlp.experts"]["up_proj"][2] == 4


def test_convert_reads_shards_and_writes_shards(sharded_model, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    bits = every_width_of_sharded(sharded_model)
    convert(sharded_model, whole, bit_map=bits, quantizer="mse")
    summary = convert(sharded_model, parts, bit_map=bits, max_shard_size=50_000, quantizer="mse")
    files = sorted(parts.glob("*.safetensors"))
    assert len(files) > 3
    assert summary.size_after == sum(file.stat().st_size for file in files)
    one, many = stored(whole), stored(parts)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((parts / "model.safetensors.index.json").read_bytes())["weight_map"]
    assert index == {name: file.name for file in files for name in load_file(file)}


def every_width_of_sharded(sharded_model):
    weight_map = json.loads((sharded_model / "model.safetensors.index.json").read_bytes())["weight_map"]
    names = sorted(name.removesuffix(".weight") for name in weight_map if ".experts." in name)
    return {name: 1 + i % 8 for i, name in enumerate(names)}


def test_convert_is_deterministic(tiny_model, tmp_path):
    for name in ("one", "two"):
        convert(tiny_model("qwen2_moe"), tmp_path / name, **QUICK)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_convert_reports_the_sizes_of_the_files(tiny_model, tmp_path):
    source, out = tiny_model("qwen2_moe"), tmp_path / "out"
    bits = every_width(source)
    summary = convert(source, out, bit_map=bits, quantizer="mse")
    experts = {name: tensor for name, tensor in stored(out).items() if ".experts." in name}
    numel = 24 * 128 * 128
    assert summary.size_before == (source / "model.safetensors").stat().st_size
    assert summary.size_after == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert summary.experts_before == 2 * numel
    assert summary.experts_after == sum(tensor.nbytes for tensor in experts.values())
    assert summary.bits == 4.5
    assert summary.stored_bits == 8 * summary.experts_after / numel == 4.75
    assert summary.widths == dict.fromkeys(range(1, 9), 3)
    assert (summary.family, summary.layers, summary.experts, summary.matrices) == ("qwen2_moe", 2, 4, 24)
    assert summary.alpha is summary.gamma is summary.gap is None


def test_command_prints_a_summary_and_progress(tiny_model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "my out"
    arguments = [tiny_model("qwen2_moe"), out, "--bits", "2.5", "--noise", "analytic", "--gamma", "2"]
    assert call(*arguments, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr()
    for part in (
        "qwen2_moe, 2 MoE layers of 4 experts, 24 expert matrices",
        "2.5000 by codes, 2.7500 as stored",
        "2 bits: #",
        "3 bits: #",
        "gamma:          2\n",
        "of the cost, proven",
        f"vllm serve '{out}' --quantization alphaq",
    ):
        assert part in printed.out
    assert "measure: 100%" in printed.err
    assert "write: 100%" in printed.err


def test_command_prints_json(tiny_model, tmp_path, monkeypatch, capsys):
    source, out = tiny_model("qwen2_moe"), tmp_path / "out"
    (tmp_path / "map.json").write_text(json.dumps(every_width(source)))
    arguments = [source, out, "--bit-map", tmp_path / "map.json", "--group-size", 32, "--json"]
    assert call(*arguments, monkeypatch=monkeypatch) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["widths"] == {str(width): 3 for width in range(1, 9)}
    assert summary["stored_bits"] == 4.875
    assert summary["serve"] == f"vllm serve {out} --quantization alphaq"


BAD_ARGUMENTS = {
    "bits too low": (["--bits", "1.5"], "--bits: expected an average from 2 to 4, .* got 1.5"),
    "bits too high": (["--bits", "5"], "--bits: expected an average from 2 to 4, .* got 5"),
    "bits below the candidates": (["--bits", "3", "--candidate-bits", "4,8"], "from 4 to 8"),
    "bits nan": (["--bits", "nan"], "got nan"),
    "bits negative": (["--bits=-1"], "got -1"),
    "bits zero": (["--bits", "0"], "--bits: expected an average from 2 to 4, .* got 0"),
    "bits a word": (["--bits", "few"], "--bits: expected a number of bits, got 'few'"),
    "candidate 9": (["--candidate-bits", "2,9"], "--candidate-bits: expected ascending widths out of"),
    "candidates empty": (["--candidate-bits", ""], "expected widths such as 2,3,4, got ''"),
    "gamma negative": (["--gamma=-2"], "--gamma: expected 'auto' or a finite number"),
    "gamma a word": (["--gamma", "much"], "expected auto or a number, got 'much'"),
    "group size": (["--group-size", "48"], "argument --group-size: invalid choice: 48"),
    "shard size": (["--max-shard-size", "4 parsecs"], "expected a size such as 4GiB or 500MB, got '4 parsecs'"),
    "shard size zero": (["--max-shard-size", "0"], "expected a size such as"),
    "bits and bit map": (["--bits", "3", "--bit-map", "x.json"], "not allowed with argument"),
    "gamma and bit map": (["--gamma", "3", "--bit-map", "x.json"], "--bit-map: .* got also --gamma: leave out one"),
    "bit map missing": (["--bit-map", "nowhere.json"], "No such file or directory: 'nowhere.json'"),
    "unknown option": (["--frobnicate"], "unrecognized arguments: --frobnicate"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_command_refuses_bad_arguments(tiny_model, tmp_path, monkeypatch, capsys, name):
    arguments, message = BAD_ARGUMENTS[name]
    source = tiny_model("qwen2_moe")
    capsys.readouterr()
    assert call(source, tmp_path / "out", *arguments, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not list(tmp_path.iterdir())


def test_convert_refuses_a_bit_map_that_disagrees_before_writing(tiny_model, tmp_path):
    bits = every_width(tiny_model("qwen2_moe"))
    del bits["model.layers.1.mlp.experts.2.up_proj"]
    with pytest.raises(ValueError, match=r"got no width for model\.layers\.1\.mlp\.experts\.2\.up_proj"):
        convert(tiny_model("qwen2_moe"), tmp_path / "out", bit_map=bits, quantizer="mse")
    assert not list(tmp_path.iterdir())


def test_convert_refuses_a_group_size_that_does_not_divide(model, tmp_path):
    config = json.loads((model / "config.json").read_bytes())
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        rows, columns = (128, 96) if "down" in name else (96, 128)
        tensors[name] = tensors[name][:rows, :columns].contiguous()
    save_file(tensors, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 96}))
    with pytest.raises(ValueError, match=r"down_proj: in_features=96 .* convert with `group_size=32`"):
        convert(model, tmp_path / "out", **QUICK, group_size=64)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("given", [True, False])
def test_convert_refuses_weights_that_are_not_finite(model, tmp_path, value, given):
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.down_proj"
    tensors[f"{name}.weight"][5, 7] = value
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name}.weight: expected finite weights, got 1 NaN or infinite"):
        convert(model, tmp_path / "out", **({"bit_map": every_width(model), "quantizer": "mse"} if given else QUICK))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_convert_refuses_its_own_source_and_an_output_with_files(model, tmp_path):
    for out in (model, model / "out"):
        with pytest.raises(ValueError, match="outside the source"):
            convert(model, out, **QUICK)
    with pytest.raises(ValueError, match="got one with files"):
        convert(model, tmp_path, **QUICK)


def test_convert_refuses_too_small_a_disk(tiny_model, tmp_path, monkeypatch):
    free = 500_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(ValueError, match=r"of free disk space, got 500\.0 KB"):
        convert(tiny_model("qwen2_moe"), tmp_path / "out", **QUICK)
    assert not list(tmp_path.iterdir())


def test_convert_counts_what_it_keeps_of_a_pass_as_needed_disk(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=8_000_000))
    settings = {"bits": 3.0, "noise": "analytic", "quantizer": "gptq", "dry_run": True}
    # Twice 8192 tokens of 128 features in float32.
    with pytest.raises(ValueError, match=r"expected (8\.[4-9]|9\.\d) MB of free disk space"):
        convert(tiny_model("qwen2_moe"), tmp_path / "out", **settings, calibration_tokens=8192)
    convert(tiny_model("qwen2_moe"), tmp_path / "out", **settings, calibration_tokens=1024)


def test_convert_refuses_a_second_conversion_of_its_output(tiny_model, tmp_path):
    out = tmp_path / "out"
    convert(tiny_model("qwen2_moe"), out, **QUICK)
    with pytest.raises(ValueError, match=r"already quantized \(quant_method 'alphaq'\)"):
        convert(out, tmp_path / "again", **QUICK)


@pytest.mark.parametrize("calls_before", [0, 1, 20])
def test_convert_leaves_no_checkpoint_when_quantization_fails(tiny_model, tmp_path, monkeypatch, calls_before):
    calls = iter(range(calls_before))

    def fail_late(*arguments, **options):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return quantize(*arguments, **options)

    monkeypatch.setattr(plan, "quantize", fail_late)
    with pytest.raises(OSError, match=r"No space left.*`resume`"):
        convert(tiny_model("qwen2_moe"), tmp_path / "out", **QUICK, max_shard_size=50_000)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_convert_writes_the_config_last(tiny_model, tmp_path, monkeypatch):
    write_file, written = writer._write_file, []

    def record(path, content):
        written.append(path.name)
        assert not (tmp_path / "out").exists()
        assert len(list(path.parent.glob("*.safetensors"))) == 1
        write_file(path, content)

    monkeypatch.setattr(writer, "_write_file", record)
    convert(tiny_model("qwen2_moe"), tmp_path / "out", **QUICK)
    assert written[-1] == "config.json"
    assert sorted(written) == [
        "README.md",
        "alphaq_stats.csv",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    ]


def test_command_reports_a_file_size_limit_and_leaves_no_checkpoint(tiny_model, tmp_path):
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5)); "
    script += "from offline.cli import run; from offline.convert import main; run(main)"
    arguments = [str(tiny_model("qwen2_moe")), str(tmp_path / "out"), "--noise", "analytic"]
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert re.search("error: .*File too large: .* with --resume", result.stderr)
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_command_reports_that_memory_ran_out_and_resumes(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=4096, intermediate_size=4096, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=32, num_local_experts=1, num_experts_per_tok=1,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).bfloat16().save_pretrained(source)
    arguments = [str(source), str(out), "--mode", "uniform", "--bits", "2", "--quantizer", "mse", "--workers", "1"]
    # A matrix takes 67 MB in float32. What transformers imports for the check of the source does not count.
    script = "import resource, sys; from offline.cli import run; from offline.convert import main; "
    script += "from offline.model.skeleton import needs; from offline.source.checkpoint import open_checkpoint; "
    script += "needs(open_checkpoint(sys.argv[1])); "
    script += "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + 50 * 2**20; "
    script += "resource.setrlimit(resource.RLIMIT_AS, (used, used)); run(main)"
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert re.fullmatch(r"error: memory ran out: .*--workers.*--resume.*\n", result.stderr.splitlines(True)[-1])
    assert "Traceback" not in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out.partial"}
    convert(source, out, bits=2.0, mode="uniform", resume=True, workers=1, quantizer="mse")


def test_command_runs_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "offline.convert", "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0
    assert "python -m offline.convert Qwen/Qwen1.5-MoE-A2.7B qwen-alphaq --bits 3.5" in result.stdout
