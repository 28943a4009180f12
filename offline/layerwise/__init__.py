"""Quantizing a model layer by layer, each on what reaches it through the quantized layers before it."""
