"""The layer on GPUs, in Triton. Importing this does not import Triton, which may be absent where there is no GPU."""
