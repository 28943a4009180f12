"""Reading weights that another program has quantized, as the numbers that they mean: a file for each way to store them.

``method.py`` recognises the method by the config; the others join the tensors of codes and scales.
"""
