"""The networks: single-device modules that never know of ranks."""
