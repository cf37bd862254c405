"""Memory and disk: how much there is, how much was used, and what to lower if it is too little."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from plumbing.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

ADVICE = {  # flags that lower the memory of a script, and what they are
    "batch_size": "documents in a batch",
    "max_len": "tokens of a document at most",
    "topk": "clusters kept per level",
}
MIB = 2**20
GIB = 2**30


def peak_memory() -> str:
    """The most memory that this process had, in words. Nothing where the system does not tell."""
    found = []
    status = Path("/proc/self/status")
    if status.exists():
        # Linux. Its ru_maxrss would also be that of the process that started this one.
        lines = status.read_text().splitlines()
        peak_kib = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
        found.append(f"{int(peak_kib) * 1024 / GIB:.1f} GiB of memory")
    elif resource:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
        found.append(f"{peak / GIB:.1f} GiB of memory")
    if torch.cuda.is_available():
        found.append(f"{torch.cuda.max_memory_allocated() / GIB:.1f} GiB of the GPU's")
    return ", at the peak " + " and ".join(found) if found else ""


def is_out_of_memory(error: Exception) -> bool:
    """Whether this machine, or its GPU, has too little memory."""
    if isinstance(error, MemoryError):
        return True
    # torch has no error of its own for it on a CPU.
    said = str(error) if isinstance(error, RuntimeError) else ""
    signs = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return any(sign in said for sign in signs)


@contextlib.contextmanager
def memory_advice(config: Any, n_labels: int) -> Iterator[None]:
    """Turn running out of memory in here into a UserError that names sizes and their flags."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or "no more is to be had").splitlines()[0]
        sizes = []
        for key, what in ADVICE.items():
            value = getattr(config, key, None)
            if value:
                sizes.append(f"--{key.replace('_', '-')} {value} ({what})")
        more = ""
        if hasattr(config, "label_bf16"):
            more = "; --label-bf16 halves the weights of the labels"
        raise UserError(
            f"out of memory ({reason}) with {n_labels:,} labels; lower {', '.join(sizes)}{more}"
        ) from error


def need_space(
    folder: Path, n_bytes: float, replaced: tuple[str, ...] = (), advice: str = ""
) -> None:
    """UserError unless the folder can be written to and has that much room.

    The files named in `replaced` make room when they are overwritten.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise UserError(
            f"--run {folder}: cannot be written to ({error}); choose another folder"
        ) from None
    for name in replaced:
        free += sum(path.stat().st_size for path in folder.glob(name))
    if free < n_bytes:
        more = f"; {advice}" if advice else ""
        raise UserError(
            f"--run {folder}: this stage writes about {n_bytes / MIB:,.0f} MiB, "
            f"{free / MIB:,.0f} MiB are free; make room, or choose another folder{more}"
        )


def room_for_training(folder: Path, model: torch.nn.Module, cache: int) -> None:
    """UserError unless the disk has room for a training.

    At the worst moment of a save there are three checkpoints, each with AdamW's two moments, and
    two models: eleven times the weights. `cache`: bytes of features for the heads.
    """
    size = sum(parameter.nbytes for parameter in model.parameters())
    advice = ""
    if cache:
        size_of_cache = f"{cache / MIB:,.0f} MiB"
        advice = f"or do without the features for the heads, {size_of_cache}: --head-epochs 0"
    need_space(folder, 11 * size + cache, ("checkpoint*", "model.pt*"), advice)
