"""The layer on CPUs."""
