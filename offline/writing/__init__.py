"""Writing checkpoints: planned to the byte, continued after any interruption, complete or absent."""
