"""Prints; the only place, with the progress bar, where something reaches stdout or stderr."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from deadcheck.errors import UsageError
from deadcheck.safe_text import plain


def print_text(text: str) -> None:
    """Print to stdout; a reader that went away (``| head``) changes nothing about the exit code.

    UsageError where stdout cannot be written, as on a full disk.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        leave(sys.stdout)
    except OSError as error:
        leave(sys.stdout)
        raise UsageError(stdout_failed(error)) from error


def stdout_failed(error: OSError) -> str:
    """Say that stdout could not be written."""
    return f"cannot write to stdout: {error.strerror}; make room, or send it elsewhere"


def leave(stream: TextIO) -> None:
    """Let what is still to be printed go nowhere: Python exits with a code of its own when it cannot flush it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_streams() -> None:
    """Put something in the place of a closed stdout or stderr, whose number the next file would get.

    UsageError where it is stdout.
    """
    is_closed = sys.stdout is None
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if is_closed:
        raise UsageError("stdout is closed; leave it open, or send it to /dev/null")


def print_note(message: str) -> None:
    """Say something about a run that worked, on stderr."""
    _say(f"deadcheck: note: {plain(message)}")


def print_error(message: str) -> None:
    """Say what went wrong, on stderr."""
    _say(f"deadcheck: error: {plain(message)}")


def _say(line: str) -> None:
    """Print to stderr; where that cannot be written, as on a full disk, the exit code alone tells."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        leave(sys.stderr)
