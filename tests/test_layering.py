"""What each room may import. Arrows point one way; README and docs/development.md draw the same picture."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORMAT = {
    "alphaq_vllm.format", "alphaq_vllm.packing", "alphaq_vllm.linear_packing", "alphaq_vllm.checksums",
    "alphaq_vllm.cache", "alphaq_vllm.cores", "alphaq_vllm.paths", "alphaq_vllm.ranks",
    "alphaq_vllm.native_build",
}  # fmt: skip
# Modules of ``offline`` itself that any room may use.
COMMON = {"offline", "offline.messages", "offline.strict_json", "offline.progress", "offline.threads"}
WORK = COMMON | {"offline.parallel", "offline.journal"}
SOURCE, QUANTIZERS = "offline.source", "offline.quantizers"
COMMANDS = {
    f"offline.{name}"
    for name in ("convert", "measure", "allocate", "inspect", "validate", "dequantize", "upload", "plan")
}
# What a room may import of this project, beside itself: modules, and rooms with all that is in them.
MAY_IMPORT = {
    "alphaq_vllm.kernels": FORMAT,
    "alphaq_vllm.plugin": FORMAT | {"alphaq_vllm.kernels", "alphaq_vllm._offline"},
    "offline.source": FORMAT | COMMON,
    "offline.quantizers": FORMAT,
    "offline.allocation": FORMAT | COMMON,
    "offline.model": FORMAT | COMMON | {SOURCE, "offline.journal"},
    "offline.sensitivity": FORMAT | WORK | {SOURCE, "offline.model", QUANTIZERS},
    "offline.layerwise": FORMAT | WORK | {SOURCE, "offline.model", QUANTIZERS},
    "offline.writing": FORMAT | WORK | {SOURCE},
    "offline.operations": FORMAT
    | WORK
    | {SOURCE, QUANTIZERS}
    | {f"offline.{room}" for room in ("allocation", "layerwise", "model", "sensitivity", "writing")},
}
# The two that quantize a model, or read a checkpoint, in another program; what they take is imported when it is needed.
GUESTS = {
    "alphaq_vllm.plugin.online": {"offline"},
    "alphaq_vllm.transformers_quantizer": {"offline"},
    "alphaq_vllm": {"offline.operations"},
}
FILES = sorted(path for package in ("alphaq_vllm", "offline") for path in (ROOT / package).rglob("*.py"))
BLOCK_AND_IMPORT = """
import importlib, pkgutil, sys
blocked, room = sys.argv[1], sys.argv[2]
sys.modules[blocked] = None
package = importlib.import_module(room)
for module in pkgutil.walk_packages(package.__path__, room + "."):
    importlib.import_module(module.name)
"""


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in FILES}


def imported(path):
    """Modules of this project that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in NAMES else node.module for name in below}
    return {name for name in names if name.partition(".")[0] in ("alphaq_vllm", "offline")}


def within(name, rooms):
    return any(name == room or (room != "offline" and name.startswith(f"{room}.")) for room in rooms)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_room_imports_what_it_may(room):
    for name, path in NAMES.items():
        if within(name, [room]) and name not in GUESTS:
            foreign = {found for found in imported(path) if not within(found, {room, *MAY_IMPORT[room]})}
            assert not foreign, f"{name} imports {foreign}"


def test_every_room_is_in_the_table():
    rooms = {name_of(path) for path in FILES if path.name == "__init__.py"}
    parents = {"alphaq_vllm", "offline"}
    assert {room for room in rooms if not within(room, MAY_IMPORT)} == parents


def test_nobody_imports_a_command_as_a_library():
    for name, path in NAMES.items():
        assert not imported(path) & COMMANDS, name


def test_nobody_but_the_commands_parses_arguments():
    for name, path in NAMES.items():
        if name not in COMMANDS | {"offline.cli"}:
            assert "argparse" not in path.read_text(), name


def test_nobody_but_the_commands_spells_options():
    for name, path in NAMES.items():
        if name.startswith("offline.") and name not in COMMANDS | {"offline.cli", "offline.__main__"}:
            tree = ast.parse(path.read_text())
            docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and n not in docstrings]
            options = {
                option for text in texts if isinstance(text, str) for option in re.findall(r"--[a-z][a-z-]*", text)
            }
            # How vLLM is called.
            assert options <= {"--quantization"}, name


def test_only_guests_import_offline():
    for name, path in NAMES.items():
        if name.startswith("alphaq_vllm"):
            found = {module for module in imported(path) if module.startswith("offline")}
            assert name in GUESTS or not found, f"{name} imports {found}"


@pytest.mark.parametrize(
    ("blocked", "room"), [("vllm", "alphaq_vllm.kernels"), ("vllm", "offline"), ("triton", "offline")]
)
def test_room_imports_without(blocked, room):
    subprocess.run([sys.executable, "-c", BLOCK_AND_IMPORT, blocked, room], check=True)


def test_registering_does_not_import_offline():
    code = (
        "import sys, alphaq_vllm; alphaq_vllm.register(); sys.exit(any(m.startswith('offline') for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
