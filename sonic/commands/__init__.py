"""One module for each command of the program, with its options and the function that it runs."""
