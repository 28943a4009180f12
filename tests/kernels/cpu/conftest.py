"""The native kernel as a program of its own: see driver.cpp."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from alphaq_vllm import native_build as build
from alphaq_vllm.kernels import PackedExperts
from alphaq_vllm.kernels.cpu import native
from alphaq_vllm.kernels.gate import SUPPORTED_ACTIVATIONS

Driver = Callable[..., torch.Tensor]


def build_driver(directory: Path, command: Sequence[str], emulator: Sequence[str] = ()) -> Driver:
    """A function that computes a problem of the grid in a process of its own.

    command: the compiler with the options of an instruction set. emulator: what runs such programs here.
    """
    program = directory / "driver"
    source = Path(__file__).with_name("driver.cpp")
    options = ["-std=c++17", "-Wno-psabi", "-pthread", f"-I{build.KERNEL.directory}", str(source), "-o", str(program)]
    subprocess.run([*command, *options], check=True, timeout=900)

    def run(problem, threads: int = 1) -> torch.Tensor:
        (directory / "in").write_bytes(_serialized(problem, threads))
        subprocess.run([*emulator, program, directory / "in", directory / "out"], check=True, timeout=300)
        out = bytearray((directory / "out").read_bytes())
        if not out:
            return problem.x.new_empty(problem.expected.shape)
        return torch.frombuffer(out, dtype=problem.x.dtype).view(problem.expected.shape)

    return run


def _serialized(problem, threads: int) -> bytes:
    weights, routing, gate = problem.weights, problem.routing, problem.weights.gate
    ids = routing.local_expert_ids().int()
    activation = SUPPORTED_ACTIVATIONS.index(gate.activation)
    on_input = int(routing.apply_router_weight_on_input)
    numbers = [*ids.shape, weights.w13.num_experts, on_input, native.DIGITS[problem.x.dtype], activation, threads]
    numbers.append(native.DTYPES[problem.x.dtype])
    limit = float("inf") if gate.limit is None else gate.limit
    parts = [torch.tensor(numbers), torch.tensor([limit, gate.alpha, gate.beta]), problem.x]
    parts += [routing.topk_weights, ids]
    for experts, bias in ((weights.w13, weights.w13_bias), (weights.w2, weights.w2_bias)):
        parts += _stem(experts, bias)
    arrays = [part.contiguous().view(torch.uint8).numpy().tobytes() if part.numel() else b"" for part in parts]
    return b"".join(len(array).to_bytes(8, "little") + array for array in arrays)


def _stem(experts: PackedExperts, bias: torch.Tensor | None) -> list[torch.Tensor]:
    dtype = 0 if bias is None else native.DTYPES[bias.dtype]
    numbers = [dtype, experts.num_projections, experts.N, experts.K, experts.group_size]
    return [*experts.tensors, torch.empty(0) if bias is None else bias, torch.tensor(numbers)]


@pytest.fixture(scope="session")
def make_driver():
    return build_driver
