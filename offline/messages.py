"""What messages are made of."""

from __future__ import annotations

from collections.abc import Iterable


def reason(error: Exception) -> str:
    """The message of another program's error in one line, in which nothing passes for a field of ours.

    >>> reason(ValueError("`num_heads`:\\n  not a number")), reason(TimeoutError())
    ("'num_heads': not a number", 'TimeoutError')
    """
    return " ".join(str(error).split()).replace("`", "'") or type(error).__name__


def printed(name: str) -> str:
    """The name of a file, with escapes if it has what no terminal and no document should get.

    >>> printed("a\\nb"), printed("ü")
    ('a\\\\nb', 'ü')
    """
    return name if name.isprintable() else ascii(name)[1:-1]


def some(names: Iterable[str]) -> str:
    """The first few of many names, for an error message.

    >>> some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
