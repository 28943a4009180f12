"""What messages are made of."""

from __future__ import annotations

from collections.abc import Iterable


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
