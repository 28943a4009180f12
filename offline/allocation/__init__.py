"""From measured errors, and the spectra of the weights, to a width for every expert matrix."""
