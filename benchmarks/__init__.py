"""Measurements and demonstrations, each one command."""
