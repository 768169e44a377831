"""Synthetic training data: drawn people whose mouths are known exactly, and spoken sentences with known phoneme times."""
