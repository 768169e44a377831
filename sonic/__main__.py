"""python -m sonic COMMAND: the same as the console script `sonic`."""

from sonic.main import main

if __name__ == "__main__":
    main()
