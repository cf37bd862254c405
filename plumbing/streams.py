"""What a script prints can be lost, but it never ends the script: its work is worth more.

A screen may be gone: a terminal that was closed, a pipe whose reader has ended (Ctrl-C ends `tee`,
too), a log on a full disk, a daemon without any output. And a screen may not know all letters: a
log in ASCII, and a label's name in Greek.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Tolerant:
    """A text stream whose writing never fails. `failure` is the error after which it was given up.

    All else, such as `isatty` or `buffer`, is the stream's own.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        if self.failure is None:
            try:
                self.stream.write(text)
            except (OSError, ValueError, RuntimeError) as error:
                self.give_up(error)
        return len(text)

    def flush(self) -> None:
        if self.failure is None:
            try:
                self.stream.flush()
            except (OSError, ValueError, RuntimeError) as error:
                self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Write nothing more. What is left in the stream goes nowhere, or Python's end would fail.

        A RuntimeError is another matter: a signal came in the middle of a write, and its handler
        writes, too. Then only the handler's text is lost.
        """
        if isinstance(error, RuntimeError):
            return
        self.failure = error
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def tolerant_streams() -> Iterator[None]:
    """In here nothing that is printed can fail. A letter that a stream does not know is escaped."""
    # 1. A closed stream has no number. A file that is opened later would get it, and some library
    #    would print into that file. So the numbers 0, 1 and 2 are taken by files that are nowhere.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the smallest number that is free
    # 2. Streams that print what they can.
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Tolerant(stream))
    mine = sys.stdout, sys.stderr
    try:
        yield
    finally:
        for stream in mine:
            stream.flush()
        sys.stdout, sys.stderr = before


def output_failure() -> Exception | None:
    """The error after which nothing more was printed to stdout, if there was one."""
    sys.stdout.flush()
    return getattr(sys.stdout, "failure", None)


def lost_output() -> str:
    """Why a part of what was printed is lost; "" where nothing is, or where nobody reads any more.

    A reader that has ended, such as `head`, did not want the rest.
    """
    failure = output_failure()
    has_no_reader = isinstance(failure, BrokenPipeError)
    is_closed_terminal = isinstance(failure, OSError) and failure.errno == errno.EIO
    if failure is None or has_no_reader or is_closed_terminal:
        return ""
    return str(failure)
