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


def correct_bfloat16_rounding() -> None:
    """The interpreter cuts float32's last bits off."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast_impl = InterpreterBuilder.cast_impl

    def cast_to_nearest(self, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(self, source, target)
        rounded = torch.tensor(source.data).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_to_nearest


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    correct_bfloat16_dot()
    correct_bfloat16_rounding()
    torch.set_num_threads(1)
    # torch.empty yields NaN, so that reading what was never written shows.
    torch.use_deterministic_algorithms(True)
