"""From a matrix and a width to codes, scales and zero points."""
