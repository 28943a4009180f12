import ast
import subprocess
import sys
from pathlib import Path

import pytest

import alphaq_vllm

BLOCK_AND_IMPORT = """
import importlib, pkgutil, sys
blocked, room = sys.argv[1], sys.argv[2]
sys.modules[blocked] = None
package = importlib.import_module(room)
for module in pkgutil.walk_packages(package.__path__, room + "."):
    importlib.import_module(module.name)
"""


@pytest.mark.parametrize(
    ("blocked", "room"), [("vllm", "alphaq_vllm.kernels"), ("vllm", "offline"), ("triton", "offline")]
)
def test_room_imports_without(blocked, room):
    subprocess.run([sys.executable, "-c", BLOCK_AND_IMPORT, blocked, room], check=True)


def test_two_modules_import_offline_and_only_when_it_is_needed():
    root = Path(alphaq_vllm.__file__).parent
    importing = {path.relative_to(root).as_posix() for path in root.rglob("*.py") if "offline" in imported_rooms(path)}
    assert importing == {"plugin/online.py", "transformers_quantizer.py"}
    code = (
        "import sys, alphaq_vllm; alphaq_vllm.register(); sys.exit(any(m.startswith('offline') for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def imported_rooms(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.partition(".")[0] for name in names}
