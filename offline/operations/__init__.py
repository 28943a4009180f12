"""The work of each command, and its options."""
