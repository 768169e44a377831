"""One module for each command of the program: its options, and the function that it runs."""
