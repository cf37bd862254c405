"""Ctrl-C, and other signals that a program should end: noted now, obeyed when it is safe."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from plumbing import several_devices

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
ONCE_MORE = 1.0  # seconds after which a second Ctrl-C is meant as one


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether a signal to stop has come; Ctrl-C again stops at once.

    A second signal need not mean a second wish. `timeout` sends SIGTERM to the program and then to
    its group, a terminal that is closed sends SIGHUP by way of the shell once more, and a program
    that has started this one may pass on the Ctrl-C that both have heard. So only a Ctrl-C that
    comes a second later stops at once.
    """
    came = []  # the times when a signal came

    def note(number: int, frame: Any) -> None:
        is_again = len(came) > 0 and time.monotonic() - came[0] > ONCE_MORE
        came.append(time.monotonic())
        # torchrun passes a Ctrl-C on to processes that have heard of it already.
        if is_again and number == signal.SIGINT and several_devices.n_processes() == 1:
            raise KeyboardInterrupt
        if len(came) == 1:
            say("stopping after this step; Ctrl-C once more to stop at once\n")

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


def say(text: str) -> None:
    """Print to stderr from within a signal handler, if that is possible.

    Not by print: the signal may have come in the middle of one. And whoever reads the output may
    have ended by the same signal.
    """
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
