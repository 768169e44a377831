"""Synthetic training data: drawn people with exactly known mouths, and synthesised sentences with known phoneme times."""
