"""Prints; the only place, with the progress bar, where something reaches stdout or stderr."""

from __future__ import annotations

import os
import sys

from deadcheck.safe_text import plain


def print_text(text: str) -> None:
    """Print to stdout; a reader that went away (``| head``) changes nothing about the exit code."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would print a traceback when it flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_note(message: str) -> None:
    """Say something about a run that worked, on stderr."""
    print(f"deadcheck: note: {plain(message)}", file=sys.stderr)


def print_error(message: str) -> None:
    """Say what went wrong, on stderr."""
    print(f"deadcheck: error: {plain(message)}", file=sys.stderr)
