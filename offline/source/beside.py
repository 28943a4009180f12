"""The files beside the weights: which of them a copy of the model takes along, and which stay behind.

The rule goes by names and sizes, so that a user can tell beforehand; docs/converting.md has it in words. Code is taken
along as a file, and never run. No link is followed to where none of the weights lie, for it could lead to a secret of
the user's, and the copy is made to be published.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import category

from offline.messages import printed
from offline.source.architectures import has_own_code
from offline.source.hub import absent_files

# What tells how the source's weights are quantized, which those of a copy are not: ModelOpt's, AutoAWQ's, AutoGPTQ's,
# AutoRound's.
QUANTIZATION = ("hf_quant_config.json", "quant_config.json", "quantize_config.json", "quantization_config.json")
# What a copy writes anew: config, index, card, sums and statistics.
REPLACED = ("config.json", "model.safetensors.index.json", "README.md", "SHA256SUMS", "alphaq_stats.csv")
MAX_BYTES = 100_000_000

# Patterns of names in lower case. Settings, templates, vocabularies, licences and policies:
_KINDS = (
    "*.json", "*.txt", "*.md", "*.jinja", "*.jinja2", "*.model", "*.model.*", "*.tiktoken", "*.spm", "*.bpe", "*.vocab",
    "tokenizer*", "license*", "licence*", "notice*", "copying*", "copyright*", "*policy", "*policy.*",
)  # fmt: skip
# The code that makes the model's input, where no file of settings names it.
_CODE = ("*tokeniz*.py", "*processing*.py", "encoding*.py")
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz",
    ".npy", ".pkl", ".pickle", ".tflite", ".pb", ".ot", ".distcp", ".index.json",
)  # fmt: skip
# Categories of letters that a list of checksums cannot have: controls, halves of letters, separators of lines.
_NOT_IN_SUMS = ("Cc", "Cs", "Zl", "Zp")
_FOREIGN_FOLDERS = (".*", "__pycache__", "original", "checkpoint-*", "runs", "wandb", "logs")
# Folders in folders are looked into, and no deeper.
_DEPTH = 2

# Files of settings that name code, and how code names other code beside it.
_SETTINGS = (
    "config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
_MODULES = "modules.json"
_RELATIVE_IMPORT = re.compile(rb"^[ \t]*from[ \t]+\.(?:[ \t]+import[ \t]+(\w+)|(\w+)[ \t]+import\b)", re.MULTILINE)


class Sidecar(NamedTuple):
    """A file that a copy takes along: its name there, with folders, and where it is."""

    name: str
    path: Path


@dataclass(frozen=True)
class Beside:
    """What lies beside the weights.

    taken: the files that a copy takes along, by name; code: the names of those that are Python code; left: what stays
    behind, a folder with a slash at its end, and the reason in brackets where the name does not tell it.
    """

    taken: tuple[Sidecar, ...]
    code: tuple[str, ...]
    left: tuple[str, ...]


def look_beside(directory: Path, weights: Sequence[Path]) -> Beside:
    """Find what lies beside the ``weights`` in a directory, and in the repository that it is a snapshot of."""
    own = {*REPLACED, *(file.name for file in weights)}
    present = [name for name in _walk(directory) if name not in own]
    absent = [name for name in absent_files(directory) if name not in own]
    modules = _read(directory / _MODULES)
    whole = _foreign_folders([*present, *absent], {_top(f"{path}/") for path in _values(modules, "path")})
    inside = [name for name in present if _top(name) not in whole]
    roots = {file.resolve().parent for file in weights}
    reasons = {name: _reason(directory, name, roots) for name in inside}
    code = _code(directory, [name for name in inside if not reasons[name]], _values(modules, "type"))
    wanted = {name: reasons[name] for name in inside if name in code or _is_wanted(name)}
    taken = [name for name, reason in wanted.items() if not reason]
    left = [printed(name) for name in inside if name not in wanted]
    left += [f"{printed(name)} ({reason})" for name, reason in wanted.items() if reason]
    left += [
        f"{printed(name)}{' (not in the cache)' if _is_wanted(name) else ''}"
        for name in absent
        if _top(name) not in whole
    ]
    left += [f"{printed(folder)}/" for folder in whole]
    return Beside(
        tuple(Sidecar(name, directory / name) for name in taken),
        tuple(name for name in taken if name.endswith(".py")),
        _collapsed(left, taken),
    )


def hub_patterns() -> tuple[list[str], list[str]]:
    """What to download of a repository on the Hub beside its weights, and what not even if it matches, as the Hub's
    client takes them, for whom a star stands for slashes too.
    """
    kinds = ["".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in kind) for kind in _KINDS]
    folders = [f"{prefix}{folder}/*" for folder in _FOREIGN_FOLDERS for prefix in ("", "*/")]
    weights = [f"*{ending}" for ending in _WEIGHTS if ending not in (".safetensors", ".index.json")]
    return [*kinds, *(f"*/{kind}" for kind in kinds), *_CODE], [*folders, *weights, "*/*.safetensors"]


def still_wanted(snapshot: Path) -> list[str]:
    """Files that a snapshot lacks of its repository, and of which its settings tell that a copy takes them along."""
    absent, modules = absent_files(snapshot), _read(snapshot / _MODULES)
    folders = {_top(f"{path}/") for path in _values(modules, "path")} - {""}
    weights = [name for name in absent if _top(name) in folders and name.lower().endswith(".safetensors")]
    names = [name for name in [*_walk(snapshot), *absent] if not _is_foreign(_top(name))]
    return [*weights, *sorted(_code(snapshot, names, _values(modules, "type")).intersection(absent))]


def _walk(directory: Path, folder: str = "", depth: int = _DEPTH) -> Iterator[str]:
    """Names of files, and of folders that are not looked into, with a slash at the end."""
    try:
        with os.scandir(directory / folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except PermissionError:
        yield folder
        return
    for entry in found:
        name = f"{folder}{entry.name}"
        # That of ``entry`` raises for a link that leads to itself.
        if not Path(entry.path).is_dir():
            yield name
        elif entry.is_symlink() or not depth or _is_foreign(entry.name):
            yield f"{name}/"
        else:
            yield from _walk(directory, f"{name}/", depth - 1)


def _foreign_folders(names: Iterable[str], modules: set[str]) -> set[str]:
    """The folders at the top that stay behind with all that is in them: by their names, or because weights are there.

    modules: folders that are parts of the model, so that their weights are.
    """
    return {
        folder
        for name in names
        if (folder := _top(name))
        and (_is_foreign(folder) or (folder not in modules and name.lower().endswith(_WEIGHTS)))
    }


def _is_foreign(folder: str) -> bool:
    return any(fnmatchcase(folder.lower(), pattern) for pattern in _FOREIGN_FOLDERS)


def _is_wanted(name: str) -> bool:
    """Whether a name is of a kind to be taken along; weights here are those of a module, in its folder."""
    if name.lower().endswith(_WEIGHTS):
        return "/" in name and name.lower().endswith(".safetensors")
    return _is_of(name, (*_KINDS, *_CODE))


def _is_of(name: str, patterns: Iterable[str]) -> bool:
    base = name.removeprefix(_folder(name)).lower()
    return not base.startswith(".") and any(fnmatchcase(base, pattern) for pattern in patterns)


def _reason(directory: Path, name: str, roots: set[Path]) -> str:
    """Why a file cannot be taken along whatever its kind, or nothing.

    roots: where the weights lie. In the Hub's cache every file is a link to one directory with the contents of all.
    """
    path = directory / name
    if name in QUANTIZATION:
        return "on the source's quantization"
    if not path.is_file():
        return "not a file"
    if "\\" in name or any(category(letter) in _NOT_IN_SUMS for letter in name):
        return "a name with control characters or a backslash, or not in UTF-8"
    place = path.resolve()
    if not place.is_relative_to(directory.resolve()) and place.parent not in roots:
        return "a link out of the directory"
    return f"larger than {MAX_BYTES // 10**6} MB" if path.stat().st_size > MAX_BYTES else ""


def _code(directory: Path, names: Sequence[str], types: Iterable[str]) -> set[str]:
    """Those names that are code for the model's input: named by settings, or by a name that says so, or imported by
    such. types: of modules.
    """
    named = {f"{kind.split('.')[0]}.py" for kind in types}
    for file in _SETTINGS:
        named |= {f"{place.split('.')[0]}.py" for place in _classes(_read(directory / file))}
    code: set[str] = set()
    new = {name for name in names if name in named or _is_of(name, _CODE)}
    while new:
        code |= new
        imported = {f"{_folder(name)}{module}.py" for name in new for module in _imports(directory / name)}
        new = imported.intersection(names) - code
    return code


def _imports(path: Path) -> list[str]:
    found = _RELATIVE_IMPORT.findall(path.read_bytes()) if path.is_file() else []
    return [(module or name).decode(errors="replace") for module, name in found]


def _read(path: Path) -> Any:
    """A file's JSON, or None. What is wrong with it is for those to say who need it."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() and path.stat().st_size <= MAX_BYTES else None
    except (ValueError, RecursionError):
        return None


def _values(modules: Any, key: str) -> set[str]:
    """The strings that the entries of a list of modules have for a key."""
    entries = [entry for entry in modules if isinstance(entry, Mapping)] if isinstance(modules, list) else []
    return {value for entry in entries if isinstance(value := entry.get(key), str)}


def _classes(settings: Any) -> list[str]:
    """The classes that settings name in their ``auto_map``, a name each or a list of names and nulls, but for those of
    the model, and for that of its config where others have it.
    """
    auto_map = settings.get("auto_map") if isinstance(settings, Mapping) else None
    if not isinstance(auto_map, Mapping):
        return []
    others = ("AutoModel",) if "model_type" in settings and has_own_code(settings) else ("AutoConfig", "AutoModel")
    values = [value for key, value in auto_map.items() if not key.startswith(others)]
    return [
        name for value in values for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)
    ]


def _folder(name: str) -> str:
    """The folders that a name is in, with a slash at the end, if any."""
    return name[: name.rfind("/") + 1]


def _top(name: str) -> str:
    """The folder at the top that a name is in, if any."""
    folder, slash, _ = name.partition("/")
    return folder if slash else ""


def _collapsed(left: Iterable[str], taken: Iterable[str]) -> tuple[str, ...]:
    """The same with a folder in place of all that is in it, where nothing of it is taken."""
    kept = {"", *map(_top, taken)}
    return tuple(sorted({name if _top(name) in kept else f"{_top(name)}/" for name in left}))
