"""How sensitive a model is to errors in each expert matrix: spectra, quantization errors, and how far they reach."""
