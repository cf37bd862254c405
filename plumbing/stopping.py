"""Ctrl-C, and other signals that a program should end: noted now, obeyed when it is safe."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from plumbing import several_devices

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether a signal to stop has come; a second one stops at once."""
    came = []

    def note(number: int, frame: Any) -> None:
        # torchrun passes a Ctrl-C on to processes that have heard of it already.
        if came and several_devices.n_processes() == 1:
            raise KeyboardInterrupt
        came.append(number)
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    def has_come() -> bool:
        return bool(came)

    before = {}
    if threading.current_thread() is threading.main_thread():  # signals can be handled only there
        for name in SIGNALS:
            number = getattr(signal, name, None)  # Windows has not all of them
            # Under nohup a closed terminal is to be ignored.
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield has_come
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
