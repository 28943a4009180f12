"""The model card of a converted checkpoint: what it is, from what and how it was made, and how to serve it."""

from __future__ import annotations

import re
from pathlib import Path

from offline import VERSION
from offline.operations.summary import Summary, histogram
from offline.progress import format_bytes
from offline.source.hub import snapshot_of

CARD = "README.md"

# What of the source's front matter holds for the conversion too, where it is a plain value on one line.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
_HOW = {
    "alphaq": "allocated without calibration data, from how heavy-tailed the spectra of the weights are (AlphaQ, arXiv "
    "2606.04980)",
    "uniform": "the same for all experts, or evenly mixed of the two widths next to the budget",
    "ratio": "three, by rank of how heavy-tailed the spectra of the weights are",
    "random": "chosen at random",
    "manual": "given by hand",
}

# What ``alphaq`` goes by in place of spectra, unless the user gives alpha a weight.
_NOISE = {
    "propagated": "allocated without calibration data, from the errors that quantization causes on text that the model "
    "wrote itself",
    "expert": "allocated without calibration data, from what errors of the weights do to their experts' "
    "outputs for random inputs",
}


def render_card(summary: Summary, name: str, source: Path) -> str:
    """The text of the card.

    name: of the source, ``owner/model`` if it is on the Hub; source: its directory, where its own card is.
    """
    kept, snapshot = _front_matter(source / CARD), snapshot_of(source)
    lines = [
        "---",
        *(f"{key}: {value}" for key, value in kept.items()),
        *([f"base_model: {name}"] if "/" in name else []),
        "base_model_relation: quantized",
        "tags: [alphaq, vllm, quantized, moe]",
        "---",
        "",
        f"# {name}, quantized with AlphaQ to {summary.bits:.4g} bits",
        "",
        f"The routed experts of {name} ({summary.family}), each matrix with a bit-width of its own. "
        f"Converted with alphaq-vllm {VERSION}{f' from commit `{snapshot.commit}`' if snapshot else ''}.",
        "",
        f"- average bits of an expert's weight: {summary.bits:.4f} by codes, {summary.stored_bits:.4f} as stored, with "
        f"the grids of groups of {summary.group_size}",
        f"- size of the weights: {format_bytes(summary.size_before)} before, {format_bytes(summary.size_after)} now; "
        f"experts: {format_bytes(summary.experts_before)} before, {format_bytes(summary.experts_after)} now",
        f"- widths: {_widths(summary)}",
        f"- quantizer: {summary.quantizer_and_text}",
        f"- everything but the experts of {summary.layers} layers{_drafts(summary)}{_linear(summary)} is unchanged",
        "",
        "```",
        *histogram(summary.widths),
        "```",
        "",
        "## Serve",
        "",
        "Install AlphaQ for vLLM from a checkout of its repository, into the environment that serves "
        "(`python3 .ci/install.py VENV` in the checkout makes one, with vLLM's CPU build where there is no GPU):",
        "",
        "```",
        'pip install "PATH_OF_THE_CHECKOUT[gpu]"',
        "vllm serve PATH_OF_THIS_DIRECTORY --quantization alphaq",
        "```",
        "",
        "In transformers, `import alphaq_vllm.transformers` before `from_pretrained`, which refuses it otherwise.",
        "",
        "`SHA256SUMS` has the checksums of all files; `python -m offline.validate PATH_OF_THIS_DIRECTORY` checks them "
        "and everything else.",
        "",
        *_code(summary),
        "## Licence",
        "",
        f"That of the source, whose card states: {kept['license']}."
        if "license" in kept
        else "That of the source, whose card states none in its front matter.",
        "",
    ]
    return "\n".join(lines)


def _code(summary: Summary) -> list[str]:
    if not summary.code:
        return []
    files = ", ".join(f"`{name}`" for name in summary.code)
    return [
        "## Code",
        "",
        f"Taken from the source as files, and never run by the conversion: {files}. `trust_remote_code` runs them: "
        "read them first. The model itself needs no code of the source.",
        "",
    ]


def _widths(summary: Summary) -> str:
    spectra = summary.noise in _NOISE and summary.gamma
    also = ", and from how heavy-tailed the spectra of the weights are" if spectra else ""
    return _NOISE.get(str(summary.noise), _HOW[summary.mode]) + also


def _drafts(summary: Summary) -> str:
    if not summary.drafts:
        return ""
    matrices = f"{summary.drafts} matrices at {summary.draft_bits} bits by {summary.data_free}"
    return f", and those of layers that only draft, {matrices},"


def _linear(summary: Summary) -> str:
    layers = f"{summary.linear_layers} linear layers of attention, shared experts and dense MLPs"
    parts = [f"{layers} at {summary.linear_bits} bits"] if summary.linear_layers else []
    parts += [f"the head at {summary.head_bits} bits"] if summary.head_bits < 16 else []
    return f", and {' and '.join(parts)}," if parts else ""


def _front_matter(card: Path) -> dict[str, str]:
    """The lines of the card's front matter that are kept."""
    if not card.is_file():
        return {}
    text = card.read_bytes().decode(errors="replace").replace("\r\n", "\n")
    match = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    pairs = re.findall(r"^(\w+): *([\w./:+-]+|\"[^\"\n]*\") *$", match[1], re.MULTILINE) if match else []
    return {key: value for key, value in pairs if key in _KEPT}
