"""Runs the command line with ``python -m deadcheck``."""

from deadcheck.cli import main

if __name__ == "__main__":
    main()
