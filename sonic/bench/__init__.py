"""Benchmarks of inference and its parts on this machine."""
