"""Make training data: python launch/precompute.py +precompute=preview_voices [overrides]."""

from start import start

if __name__ == "__main__":
    start("precompute")
