"""Sources that are quantized already, of every kind: what is converted from them, vLLM serves as what they mean.

The kinds differ in nothing that vLLM sees: all give the files, the config and the tensors that a source in full
precision gives. So some are served in ``make test``, and the rest in ``make test-long``.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from alphaq_vllm import convert, dequantize
from offline.source.beside import QUANTIZATION
from offline.source.checkpoint import SINGLE, open_checkpoint
from offline.source.families import find_experts
from tests.offline.source.quantized import test_awq_and_gptq, test_compressed_tensors, test_mxfp4, test_spellings
from tests.serving.scoring import score
from tests.serving.test_families import ON_GPU, save_model, scored_by_transformers


def write_mxfp4(path, source, kind):
    """As the other writers: a copy of a checkpoint of some kind, and what its quantized weights mean."""
    _, tensors = test_mxfp4.write(path, source)
    stems = [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]
    return {stem: convert_moe_packed_tensors(*(tensors[f"{stem}_{part}"] for part in ("blocks", "scales")))
            for stem in stems}  # fmt: skip


# By kind: what writes it, and the type of model.
KINDS = {
    "gpt-oss": (write_mxfp4, "gpt_oss"),
    **dict.fromkeys(test_spellings.SPELLINGS, (test_spellings.write, "qwen3_moe")),
    **dict.fromkeys(test_compressed_tensors.KINDS, (test_compressed_tensors.write, "qwen3_moe")),
    **dict.fromkeys(test_awq_and_gptq.CONFIGS, (test_awq_and_gptq.write, "qwen2_moe")),
}
# On the mean difference that 8 bits for the experts make.
BOUND = 0.03
# Kinds that round as little themselves: log-probabilities do not tell the source from what it was made of.
FINE = ("int8 in words", "int8 of rows", "gptq of 8 bits", "auto-round of 8 bits")
ALWAYS = ("gpt-oss", "int4 as Kimi", "old ModelOpt nvfp4", "DeepSeek-V3")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """``plain(model_type)``: the directory of a model in bfloat16, not to be changed."""
    made = {}

    def make(model_type):
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp("plain") / model_type
            save_model(model_type, made[model_type])
        return made[model_type]

    return make


def write(kind, plain, folder):
    """A source of a kind, with all files that programs for quantization leave beside it, and what it means."""
    writer, model_type = KINDS[kind]
    meanings = writer(folder, plain(model_type), kind)
    for name in QUANTIZATION:
        if not (folder / name).exists():
            (folder / name).write_text("{}")
    return meanings


def to_8_bits(source, folder):
    matrices = find_experts(open_checkpoint(str(source))).matrices
    convert(source, folder, bit_map={matrix.name: 8 for matrix in matrices}, group_size=64, quantizer="mse")
    return folder


def seen_by_vllm(folder):
    """The names of the files, the config, and names, shapes and dtypes of the tensors."""
    checkpoint = open_checkpoint(str(folder))
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return names, checkpoint.config, {name: checkpoint.spec(name) for name in checkpoint.tensors}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_converted_does_not_show_the_kind_of_its_source(kind, plain, tmp_path):
    write(kind, plain, tmp_path / "source")
    expected = to_8_bits(plain(KINDS[kind][1]), tmp_path / "expected")
    assert seen_by_vllm(to_8_bits(tmp_path / "source", tmp_path / "out")) == seen_by_vllm(expected)


@pytest.mark.parametrize(
    "kind", [kind if kind in ALWAYS else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]
)
def test_vllm_gives_the_log_probabilities_of_what_the_source_means(kind, plain, vllm, tmp_path):
    source, meaning, dequantized = (tmp_path / name for name in ("source", "meaning", "dequantized"))
    original = plain(KINDS[kind][1])
    meanings = write(kind, plain, source)
    checkpoint = to_8_bits(source, tmp_path / "checkpoint")
    dequantize(str(checkpoint), dequantized, dtype="float32")
    shutil.copytree(original, meaning)
    means = {name: values.float().contiguous() for name, values in meanings.items()}
    save_file({**load_file(original / SINGLE), **means}, meaning / SINGLE, {"format": "pt"})
    served = torch.tensor(vllm.submit(score, checkpoint, {"dtype": "float16" if ON_GPU else "float32"}).result())
    exact, meant, unrounded = map(scored_by_transformers, (dequantized, meaning, original))
    assert (served - exact).abs().max() < (0.1 if ON_GPU else 0.002)
    assert (served - meant).abs().mean() < BOUND
    assert kind in FINE or (unrounded - meant).abs().mean() > BOUND
