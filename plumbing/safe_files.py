"""Reading files that anybody may have made: nothing is executed, and nothing huge is allocated.

Both kinds of artifact, .npz and .pt, are zip archives. A file may be damaged. It may also be made
by somebody who wishes us harm: it may hold code (a pickle), claim to hold more than it does (a zip
bomb, a forged header), or ask for a lot of memory. What this program writes is never compressed, so
a file that would take more memory than its size is refused before it is read.
"""

import math
import zipfile
from pathlib import Path

import numpy as np
import torch

READ_HEADER = {  # by the version of the .npy format
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def refuse_bomb(path: Path) -> None:
    """ValueError where reading the file could take more memory than its size."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        is_compressed = any(member.compress_type for member in members)
        size = sum(member.file_size for member in members)
        if is_compressed or size > path.stat().st_size:
            raise ValueError("it claims to hold more than the file does")
        # torch's safe unpickler calls one name with a size that the file chooses:
        # bytearray(10**12).
        for member in members:
            if member.filename.endswith("data.pkl") and b"bytearray" in archive.read(member):
                raise ValueError("it holds a bytearray")


def read_npz(path: Path, *keys: str) -> dict[str, np.ndarray]:
    """Arrays of an .npz file, all or the named ones. ValueError where a header lies."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                shape, _, dtype = READ_HEADER[version](file)
                claimed = math.prod(shape) * dtype.itemsize
                if claimed + file.tell() != member.file_size:
                    raise ValueError(f"{member.filename} does not have the size that it claims")
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in keys or archive.files}


def read_pt(path: Path, mmap: bool = False) -> dict:
    """Tensors and plain values of a .pt file, on the CPU; with mmap only what is looked at."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
