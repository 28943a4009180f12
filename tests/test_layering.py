import subprocess
import sys

import pytest

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


def test_plugin_does_not_import_offline():
    code = (
        "import sys, alphaq_vllm; alphaq_vllm.register(); sys.exit(any(m.startswith('offline') for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
