"""A source with a damage is converted to the right values, or refused in one line that leaves nothing behind."""

import shutil

import pytest
import torch
import transformers

from alphaq_vllm import convert, dequantize, validate
from alphaq_vllm.plugin.online import choose_online
from offline.source.checkpoint import SINGLE, open_checkpoint
from offline.source.families import find_experts
from tests.offline.conftest import COMMON, CONFIGS
from tests.offline.quantizers.samples import assert_rounded_to_8_bits
from tests.reliability.damages import KINDS, damage, recast, retype

FAMILIES = ("qwen2_moe", "deepseek_v3", "granitemoe", "mixtral", "qwen3_next", "gpt_oss")
FEW_TOKENS = {"calibration_length": 16, "calibration_tokens": 64}
WEIGHTS_ONLY = {"noise": "measured", "quantizer": "mse", "workers": 1}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """``sources(model_type)``: the directory of a tiny model in one file, not to be changed."""
    folder = tmp_path_factory.mktemp("sources")

    def make(model_type):
        if not (folder / model_type).exists():
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(model_type, **{**COMMON, **CONFIGS[model_type]})
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(folder / model_type)
        return folder / model_type

    return make


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Outside the folder that is to stay as it is."""
    monkeypatch.setenv("ALPHAQ_CACHE", str(tmp_path / "cache"))


def outcome(work):
    """The message of a refusal, or None."""
    try:
        work()
    except (ValueError, OSError) as error:
        return str(error)
    return None


def assert_values(whole, out, folder):
    """A conversion to 8 bits has the values of the undamaged source, and transformers computes numbers with them."""
    dequantize(str(out), folder, dtype="float32")
    source, output = open_checkpoint(str(whole)), open_checkpoint(str(folder))
    experts = {matrix.tensor for matrix in find_experts(source).matrices}
    assert set(source.tensors) == set(output.tensors)
    for name in source.tensors:
        expected, got = source.load(name).float(), output.load(name).float()
        if name in experts:
            assert_rounded_to_8_bits(got, expected)
        else:
            # A source in float16 has rounded what is tiny.
            assert (got - expected).abs().max() <= 1e-6, name
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        assert bool(model(torch.arange(3, 19)[None]).logits.isfinite().all())


def convert_or_refuse(whole, folder, number):
    """What was done to a copy of a source, and the message of its refusal, None if it was converted rightly."""
    source, out = shutil.copytree(whole, folder / "source"), folder / "out"
    done, default = damage(source, number), {"workers": 1, **FEW_TOKENS}
    refusal = outcome(lambda: convert(source, out, **default))
    if refusal is None:
        shutil.rmtree(out)
        bits = {matrix.name: 8 for matrix in find_experts(open_checkpoint(str(source))).matrices}
        convert(source, out, bit_map=bits, quantizer="mse", workers=1)
        validate(out, source)
        assert_values(whole, out, folder / "dequantized")
        return done, None
    assert "\n" not in refusal and "got" in refusal, done
    assert outcome(lambda: convert(source, out, **WEIGHTS_ONLY)) == refusal, done
    assert outcome(lambda: convert(source, out, **default, dry_run=True)) == refusal, done
    # gpt-oss is never quantized while it loads.
    assert whole.name == "gpt_oss" or outcome(lambda: choose_online(str(source), None, {})) == refusal, done
    assert [path.name for path in folder.iterdir()] == ["source"], done
    return done, refusal


def assert_right_or_refused(sources, folder, number):
    """Returns whether it was refused."""
    folder.mkdir()
    family = FAMILIES[number // len(KINDS) % len(FAMILIES)]
    done, refusal = convert_or_refuse(sources(family), folder, number)
    print(f"{number}: {family}: {done}: {refusal or 'converted'}")
    harmless = KINDS[number % len(KINDS)] in (recast, retype)
    assert refusal or harmless, done
    return refusal is not None


@pytest.mark.parametrize("number", range(20))
def test_a_damaged_source_is_converted_to_the_right_values_or_refused(sources, tmp_path, number):
    assert_right_or_refused(sources, tmp_path / "work", number)


@pytest.mark.long
def test_100_damaged_sources_are_converted_to_the_right_values_or_refused(sources, tmp_path):
    refused = [assert_right_or_refused(sources, tmp_path / str(number), number) for number in range(100)]
    assert 60 < sum(refused) < 95


def test_a_number_gives_the_same_damage_and_another_one_another(sources, tmp_path):
    first, again, other = (shutil.copytree(sources("mixtral"), tmp_path / name) for name in ("a", "b", "c"))
    assert damage(first, 1) == damage(again, 1) != damage(other, 2)
    assert (first / SINGLE).read_bytes() == (again / SINGLE).read_bytes()
