"""What vLLM sees of AlphaQ. The only room that imports vLLM."""
