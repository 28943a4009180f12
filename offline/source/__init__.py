"""Reading checkpoints of every supported family, whatever way they hold their experts."""
