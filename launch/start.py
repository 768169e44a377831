"""Starts a command of the installed library for the files beside this one, which torchrun needs."""

import sys


def start(command: str) -> None:
    """Run a command with the arguments of this process, or say in one sentence that the library is missing."""
    try:
        from sonic.main import main
    except ModuleNotFoundError as error:
        if error.name not in ("sonic", "sonic.main"):
            raise
        sys.stderr.write("sonic is not installed; run pip install -e . or ./launch/quickstart.sh\n")
        sys.exit(2)
    main([command, *sys.argv[1:]])
