"""What vLLM's CPU build lacks to serve with data or pipeline parallelism.

A plugin of vLLM that the tests of these install for their servers.
"""

import torch
import torch.distributed


def all_gatherv(self, input_, dim=0, sizes=None):
    """The tensors of all ranks one after the other; ``sizes``: how many rows each rank has, if not all as many."""
    if isinstance(input_, list):
        return [all_gatherv(self, tensor, dim, sizes) for tensor in input_]
    sizes = sizes or [len(input_)] * self.world_size
    padded = input_.new_zeros(max(sizes), *input_.shape[1:])
    padded[: len(input_)] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatterv(self, input_, dim=-1, sizes=None):
    """The sum over ranks, of which each rank gets its rows."""
    summed = input_.clone()
    torch.distributed.all_reduce(summed, group=self.device_group)
    return summed.split(sizes or len(input_) // self.world_size)[self.rank_in_group].clone()


def register():
    """Called by vLLM in each of its processes."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv
    # On GPUs they are copied to buffers that a dummy run has made, which there is not on CPUs.
    CPUModelRunner.sync_and_gather_intermediate_tensors = lambda self, num_tokens, tensors, sync_self: tensors
