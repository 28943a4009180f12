"""The model card of a conversion."""

import json
from dataclasses import replace

import pytest

from alphaq_vllm import convert
from offline.operations.card import render_card
from offline.operations.summary import Summary

SUMMARY = Summary(
    source="owner/model",
    family="qwen2_moe",
    layers=2,
    experts=4,
    matrices=24,
    group_size=128,
    mode="alphaq",
    bits=3.5,
    stored_bits=3.75,
    size_before=4_000_000,
    size_after=1_500_000,
    experts_before=3_000_000,
    experts_after=700_000,
    widths={3: 12, 4: 12},
    alpha=None,
    gamma=None,
    gap=None,
)


def front_matter(text):
    return text.split("---\n")[1].splitlines()


def test_card_says_what_from_what_and_how(tiny_model, tmp_path):
    convert(tiny_model("qwen2_moe"), tmp_path / "out", bits=3.0, mode="uniform", group_size=64, quantizer="mse")
    text = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "# qwen2_moe, quantized with AlphaQ to 3 bits",
        "3.0000 by codes, 3.2500 as stored, with the grids of groups of 64",
        "experts: 786.4 KB before, 159.7 KB now",
        "3 bits: ####",
        "- widths: the same for all experts",
        "vllm serve PATH_OF_THIS_DIRECTORY --quantization alphaq",
        "SHA256SUMS",
        "whose card states none",
    ):
        assert part in text
    assert str(tmp_path) not in text
    assert str(tiny_model("qwen2_moe").parent) not in text


def test_card_keeps_the_licence_of_the_source(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\r\nlicense: other\nlicense_name: my-licence\nlicense_link: https://example.org/a?b\n"
        "language: en\ntags:\n- a\n  license: mit\nbase_model: x/y\n"
        'pipeline_tag: "text-generation"\n---\n# Model\nlicense: z\n'
    )
    text = render_card(SUMMARY, "owner/model", tmp_path)
    assert front_matter(text) == [
        "license: other",
        "license_name: my-licence",
        "language: en",
        'pipeline_tag: "text-generation"',
        "base_model: owner/model",
        "base_model_relation: quantized",
        "tags: [alphaq, vllm, quantized, moe]",
    ]
    assert "whose card states: other." in text


@pytest.mark.parametrize(
    "content", ["", "no front matter", "---\nlicense: mit\n", "---\nlicense: [a,\n b]\n---\n", "\xff"]
)
def test_card_does_without_a_licence_that_it_cannot_read(tmp_path, content):
    (tmp_path / "README.md").write_text(content, encoding="latin-1")
    text = render_card(SUMMARY, "model", tmp_path)
    assert front_matter(text) == ["base_model_relation: quantized", "tags: [alphaq, vllm, quantized, moe]"]
    assert "states none" in text


def test_summary_in_json_has_everything(tiny_model, tmp_path):
    summary = convert(tiny_model("qwen2_moe"), tmp_path / "out", bits=3.0, mode="random", quantizer="mse")
    result = json.loads(json.dumps(summary.to_dict()))
    assert result["mode"] == "random"
    assert result["total_size"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert result["loaded_size"] < result["size_after"] < result["total_size"]


def test_card_names_spectra_only_where_they_counted(tmp_path):
    propagated = replace(SUMMARY, noise="propagated", gamma=0.0)
    assert "spectra" not in render_card(propagated, "model", tmp_path)
    assert "and from how heavy-tailed the spectra" in render_card(replace(propagated, gamma=2.0), "model", tmp_path)
    assert "from how heavy-tailed the spectra" in render_card(replace(SUMMARY, noise="analytic"), "model", tmp_path)


def test_card_says_what_drafts(tmp_path):
    text = render_card(replace(SUMMARY, drafts=12, draft_bits=4, quantizer="gptq"), "model", tmp_path)
    assert "2 layers, and those of layers that only draft, 12 matrices at 4 bits by mse, is unchanged" in text
