"""Talking video from one portrait and one recording: the Wan2.2-S2V family, from a laptop preview to sharded 14B."""

__version__ = "0.1.0"
