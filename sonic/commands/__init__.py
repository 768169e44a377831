"""One module for each command of the program: what it may be told, and the job that it starts."""
