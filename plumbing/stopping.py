"""Ctrl-C, and other wishes of a system that a program should end."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C has come since, or a wish to end; a second one stops at once."""
    came, before = [], {}

    def note(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    if threading.current_thread() is threading.main_thread():  # only there may signals be handled
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        numbers = [getattr(signal, name) for name in names]
        before = {number: signal.signal(number, note) for number in numbers
                  if signal.getsignal(number) is not signal.SIG_IGN}  # under nohup a closed terminal is nothing
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
