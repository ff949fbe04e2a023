"""Runs the command line as `python -m evomerge`."""

from evomerge.cli import main

if __name__ == "__main__":
    main()
