"""A GPU in numpy: runs what Triton compiled for an NVIDIA GPU, instruction by instruction, where there is no GPU.

Triton's interpreter runs a kernel's Python; this runs the PTX that the compiler made of it, so that the deal of values
to lanes, the pipeline of copies, barriers and the matrix instructions' layouts are tested too.

It is strict where a GPU is not. What PTX leaves undefined is a ``MemoryFault`` that says what is not ordered: see
``shared_memory``, ``tensor_memory`` and ``wgmma``. What the emulator does not model is ``NotEmulated``, by name. How
sums are rounded is in ``matrix``. Not checked: what threads pass to each other through global memory.
"""
