"""Who works in a run folder: stages 1, 2 and 4 want it for themselves.

Two trainings in one folder would mix their logs and put their models in each other's place, and
new data would make a training's hours worthless, because its model belongs to the data of before.
So the first one owns the folder while it lives, and another one is refused.

The owner holds a lock of the operating system on RUN/in_use.txt. The system lets go of it when the
process ends, however it ends, so a folder is never locked by something dead. Stage 5 and the tools
read what is whole, and may do so at any time.
"""

import contextlib
import functools
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from plumbing import several_devices
from plumbing.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "in_use.txt"
WAIT = 2.0  # seconds that a new owner has to say who it is
MINE: set[Path] = set()  # folders that this process owns: a variant runs stage 4 in its folder


def owns_its_folder(run: Callable) -> Callable:
    """run(config, ...) of a stage, as the only one in the folder config.run."""

    @functools.wraps(run)
    def run_alone(config: Any, *args, **more) -> Any:
        with owned(Path(config.run)):
            return run(config, *args, **more)

    return run_alone


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """In here the folder is ours. UserError, with who and since when, while it is another's.

    With torchrun the first process owns it for all of them. A folder that does not exist yet is
    made, and if nothing has been put into it in the end, it is taken away again.
    """
    where = Path(os.path.abspath(folder))
    if where in MINE or not several_devices.is_first():
        yield
        return
    missing = [one for one in (where, *where.parents) if not os.path.lexists(one)]
    file = take(folder / NAME)
    MINE.add(where)
    try:
        yield
    finally:
        MINE.discard(where)
        if file is not None:
            leave(file, folder / NAME)
        for one in missing:
            with contextlib.suppress(OSError, ValueError):  # something is in it now
                one.rmdir()


def take(path: Path) -> int | None:
    """The locked file, open; None where nothing can be locked. UserError if it is another's."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError):  # ValueError: a NUL in the name
            return None  # the stage cannot make the folder either, and says so
        try:
            # Not through a link that somebody has put there.
            no_link = getattr(os, "O_NOFOLLOW", 0)
            file = os.open(path, os.O_RDWR | os.O_CREAT | no_link, 0o666)
        except FileNotFoundError:
            continue  # an owner that made the folder has just taken it away again: once more
        except OSError as error:
            say_unlocked(path, error)
            return None
        try:
            is_ours = lock(file)
        except OSError as error:
            say_unlocked(path, error)
            leave(file, path)
            return None
        if not is_ours:
            os.close(file)
            refuse(path)
        if is_still_there(file, path):
            break
        os.close(file)  # its owner has just ended and removed it: once more
    # On a full disk the folder is ours without our name in it.
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.write(file, who_we_are().encode())
    return file


def leave(file: int, path: Path) -> None:
    """Remove the file and let go of it.

    In this order: a process that has opened it meanwhile finds that it is not there any more.
    """
    if is_still_there(file, path):
        with contextlib.suppress(OSError):
            path.unlink()
    os.close(file)


def say_unlocked(path: Path, error: OSError) -> None:
    print(
        f"note: {path.parent} cannot be locked ({error.strerror or error}): nothing keeps a second "
        "training out of it, so start none"
    )


def lock(file: int) -> bool:
    """Whether the file is ours now. OSError where files cannot be locked."""
    if fcntl is None:
        raise OSError("this system has no flock")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_still_there(file: int, path: Path) -> bool:
    """Whether the open file is the one that the path names."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def refuse(path: Path) -> None:
    """UserError that says whose the folder is."""
    # The owner may have taken the lock a moment ago, and be about to write its name.
    end = time.monotonic() + WAIT
    who = ""
    while not who and time.monotonic() < end:
        with contextlib.suppress(OSError):
            who = path.read_text(errors="replace")[:200].strip()
        if not who:
            time.sleep(0.05)
    raise UserError(
        f"--run {path.parent} is in use: {who or 'by another process'}; wait until it has ended, "
        "stop it, or choose another folder"
    )


def who_we_are() -> str:
    """The script, process and host that own the folder, and since when."""
    script = Path(sys.argv[0]).name
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"{script}, process {os.getpid()} on {socket.gethostname()}, since {since}\n"
