"""From a Hugging Face checkpoint to an AlphaQ checkpoint: measure, allocate, quantize, pack, write."""
