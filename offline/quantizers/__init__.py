"""From a matrix and a width to codes, grids and scales."""
