"""Every failure that the project reports, by room: read from the code, so that the list cannot be out of date.

python -m tests.reliability.messages
"""

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Each owns the failures of what lies in it and in no longer path here.
ROOMS = (
    "alphaq_vllm", "alphaq_vllm/kernels", "alphaq_vllm/kernels/cpu", "alphaq_vllm/kernels/triton", "alphaq_vllm/plugin",
    "offline", "offline/source", "offline/source/quantized", "offline/model", "offline/sensitivity",
    "offline/quantizers", "offline/layerwise", "offline/allocation", "offline/writing", "offline/operations",
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """Something that is raised: the type's name, and its message with names in braces for what is filled in."""

    room: str
    file: Path
    line: int
    kind: str
    message: str


def failures():
    """All of them, in the order of the rooms and files."""
    return [failure for room in ROOMS for file in sorted((ROOT / room).glob("*.py")) for failure in _raised(room, file)]


def _raised(room, file):
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            message = node.exc.args[-1] if node.exc.args else ast.Constant("")
            yield Failure(room, file.relative_to(ROOT), node.lineno, ast.unparse(node.exc.func), _template(message))


def _template(node):
    match node:
        case ast.Constant(value=text):
            return str(text)
        case ast.JoinedStr(values=parts):
            return "".join(map(_template, parts))
        case ast.FormattedValue(value=value):
            return "{" + ast.unparse(value) + "}"
        case ast.BinOp(left=left, right=right):
            return _template(left) + _template(right)
    return "{" + ast.unparse(node) + "}"


def main():
    """Print the list."""
    for room in ROOMS:
        print(f"\n{room}\n{'-' * len(room)}")
        for failure in failures():
            if failure.room == room:
                print(f"{failure.kind}: {failure.message}")


if __name__ == "__main__":
    main()
