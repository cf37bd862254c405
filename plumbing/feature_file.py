"""A big array in a file without a name: memory holds as much of it as there is room for."""

import math
import os
import tempfile
from pathlib import Path

import numpy as np


def unnamed_array(folder: str | Path, shape: tuple[int, ...], dtype: type) -> np.memmap:
    """A writable array on the disk of `folder`; gone when the process ends, however it ends."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    with tempfile.TemporaryFile(dir=folder) as file:  # the array keeps it open as long as needed
        # Claim the room now. A disk that fills up later would kill the process without a word.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        return np.memmap(file, dtype, "w+", shape=shape)
