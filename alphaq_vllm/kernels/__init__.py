"""Mixture-of-Experts layers on packed weights of mixed widths: Triton on GPUs, torch on CPUs."""
