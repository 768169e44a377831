"""Published checkpoints, the converted form that the program loads, and reading and writing of weights."""
