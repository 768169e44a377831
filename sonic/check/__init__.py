"""The device check: what this library needs of a GPU, measured on the one that is here."""
