"""README and docs/ point at what exists: files, modules, messages."""

import importlib.util
import re
from pathlib import Path

import pytest

from offline.cli import spelled
from offline.source.quantized.method import READ, find_quantization
from tests.reliability.messages import failures

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]


def anchors(path):
    """The names by which a document's headings are linked."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.is_relative_to(ROOT) and found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_every_document_is_linked_from_readme():
    text = (ROOT / "README.md").read_text()
    assert [name for name in NAMES if name != "README.md" and f"]({name}" not in text] == []


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_files_exist(name):
    text = (ROOT / name).read_text()
    for module in re.findall(r"python3? -m ((?:offline|benchmarks|tests)(?:\.[a-z_]+)+)", text):
        assert importlib.util.find_spec(module), module
    for file in re.findall(r"`((?:alphaq_vllm|offline|benchmarks|tests|docs|\.ci|\.github)/[\w./-]+)`", text):
        assert (ROOT / file).exists(), file


def spelled_alike(text):
    """As the command line spells it, without what differs between an option and the field of its name."""
    return re.sub(r"[-_]+", " ", spelled(text)).strip()


def test_troubleshooting_has_messages_that_are_raised():
    raised = [spelled_alike(failure.message) for failure in failures()]
    headings = re.findall(r"^\*\*`(.+)`\*\*(.*)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    own = [heading for heading, of in headings if not of]
    assert len(own) >= 30
    for heading in own:
        parts = [re.escape(spelled_alike(part)) for part in heading.split("…")]
        assert any(re.fullmatch(r".*?\s*".join(parts), message) for message in raised), heading


def test_the_methods_of_quantization_that_are_read_are_listed():
    table = (ROOT / "docs/converting.md").read_text().partition("| `quant_method` |")[2].partition("\n\n")[0]
    listed = {
        name for cell in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE) for name in re.findall("`([^`]+)`", cell)
    }
    assert listed == set(re.findall(r"[\w-]+", READ)) - {"or"}
    for name in listed:
        assert find_quantization({"quantization_config": {"quant_method": name}}), name
