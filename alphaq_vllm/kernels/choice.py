"""Which kernels compute experts, where the user chooses."""

from __future__ import annotations

import os

KERNELS = "ALPHAQ_KERNELS"
# Plain: without launches that overlap, inline PTX and limits of registers. Torch: from the order of the checkpoint.
CHOICES = ("fast", "plain", "torch")


def chosen_kernels() -> str:
    """One of ``CHOICES``: what the environment variable ``ALPHAQ_KERNELS`` says, by default fast.

    On a CPU, where the native kernel has no such parts, plain is fast.

    Raises ValueError for another value.
    """
    choice = os.environ.get(KERNELS) or CHOICES[0]
    if choice not in CHOICES:
        raise ValueError(f"{KERNELS}: expected one of {', '.join(CHOICES)}, got {choice}: set one of them, or none")
    return choice
