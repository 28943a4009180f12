"""Make of a fresh process one in which Triton interprets kernels on CPU tensors.

Triton decides that for good when a kernel is defined, and a variable set among the tests would reach the kernels and
servers of all others.
"""

from __future__ import annotations

import os

import torch


def correct_bfloat16_dot() -> None:
    """The interpreter keeps bfloat16 as 16-bit integers and multiplies these."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def create_float_dot(self, a, b, *args):
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.create_fp_ext(a, tl.float32), self.create_fp_ext(b, tl.float32)
        return create_dot(self, a, b, *args)

    InterpreterBuilder.create_dot = create_float_dot


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    correct_bfloat16_dot()
    torch.set_num_threads(1)
    # torch.empty yields NaN, so that reading what was never written shows.
    torch.use_deterministic_algorithms(True)
