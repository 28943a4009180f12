"""The text of PTX, as Triton's compiler writes it, to instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    """One instruction. guard: a predicate's name, behind "!" if negated; operands: as they are written."""

    opcode: str
    operands: tuple[str, ...]
    guard: str = ""

    def __str__(self) -> str:
        return f"{f'@{self.guard} ' if self.guard else ''}{self.opcode} {', '.join(self.operands)}"


@dataclass
class Kernel:
    """One kernel. registers: each one's bits, 1 for a predicate; labels: the index of the instruction they precede.

    asynchronous: the registers that instructions use while later ones run already (``compile_kernel`` finds them).
    """

    num_threads: int
    parameters: list[tuple[str, str]]  # type ("u64", "u32", "f32") and name
    registers: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)  # of labels, by the label that precedes the table
    asynchronous: set[str] = field(default_factory=set)


def parse(text: str) -> Kernel:
    """Read a module of one kernel. Raises ValueError if it has none."""
    entry = re.search(r"\.visible \.entry \w+\((.*?)\)\s*(?:\.\w+ [\d, ]+\s*)*\.reqntid (\d+)[^{]*\{\n(.*)", text, re.S)
    if entry is None:
        raise ValueError("text: expected a kernel with .reqntid, got none")
    parameters, threads, body = entry.groups()
    kernel = Kernel(int(threads), re.findall(r"\.param \.(\w+)\b.*?(\w+)(?:,|$)", parameters, re.M))
    body = re.sub(r"//.*|^\s*\.(?:loc|pragma)\b.*", "", body, flags=re.M)
    # Braces that stand alone open and close a scope: its labels and registers are its own.
    scopes: list[int] = []  # numbers of those that are open
    opened, label = 0, ""
    for match in re.finditer(r"\s*([{}]|[$\w]+:|[^;]*;)", body):
        statement = " ".join(match[1].split())
        if statement == "{":
            opened += 1
            scopes.append(opened)
        elif statement == "}":
            if not scopes:
                break
            scopes.pop()
        elif statement.endswith(":"):
            label = _scoped(statement[:-1], scopes)
            kernel.labels[label] = len(kernel.instructions)
        elif statement.startswith(".branchtargets"):
            kernel.tables[label] = re.findall(r"[$\w]+(?=[,;])", statement)
        elif statement.startswith(".reg"):
            _declare(kernel, statement, scopes)
        elif statement != ";":
            kernel.instructions.append(_instruction(statement[:-1], scopes))
    return kernel


def _scoped(name: str, scopes: list[int]) -> str:
    return f"{name}.{scopes[-1]}" if scopes and name[0] not in "$%" else name


def _declare(kernel: Kernel, statement: str, scopes: list[int]) -> None:
    kind, names = re.fullmatch(r"\.reg \.(\w+) (.*);", statement).groups()
    bits = 1 if kind == "pred" else int(kind[1:])
    for name in names.split(","):
        several = re.fullmatch(r"\s*(%\w+)<(\d+)>", name)
        if several:
            kernel.registers.update({f"{several[1]}{i}": bits for i in range(int(several[2]))})
        else:
            kernel.registers[_scoped(name.strip(), scopes)] = bits


def _instruction(statement: str, scopes: list[int]) -> Instruction:
    guard, opcode, rest = re.fullmatch(r"(?:@(!?\S+) )?(\S+)(?: (.*))?", statement).groups()
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest or "")
    if scopes:
        operands = [_scoped(o, scopes) if re.fullmatch(r"[a-z]\w*", o, re.I) else o for o in operands]
        guard = guard and ("!" if guard[0] == "!" else "") + _scoped(guard.lstrip("!"), scopes)
    return Instruction(opcode, tuple(operands), guard or "")
