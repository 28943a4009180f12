"""A vLLM that lacks an interface which AlphaQ needs and other models do not.

A plugin of vLLM that ``test_neighbour.py`` installs for its servers. vLLM calls it before AlphaQ's, and it tells which
quantizations are registered after that.
"""

import os
import sys


def register():
    """Called by vLLM in each of its processes."""
    from vllm.model_executor.layers import quantization
    from vllm.model_executor.layers.fused_moe import expert_map_manager

    # vLLM's own layers have it by now.
    del expert_map_manager.ExpertMapManager
    registers = quantization.register_quantization_config

    def register_quantization_config(name):
        print(f"process {os.getpid()} registers {name}", file=sys.stderr, flush=True)
        return registers(name)

    quantization.register_quantization_config = register_quantization_config
