"""Memory and disk: how much was used, how much there is, and what to lower when it is too little."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from plumbing.errors import UserError


def peak_memory() -> str:
    """The most memory that this process had, in words; the system may not tell."""
    found, status = [], Path("/proc/self/status")
    if status.exists():  # Linux, whose ru_maxrss is also that of the process that started this one
        peak = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        found.append(f"{int(peak) / 2**20:.1f} GiB of memory")
    elif resource:  # macOS, in bytes
        found.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30:.1f} GiB of memory")
    if torch.cuda.is_available():
        found.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of the GPU's")
    return ", at the peak " + " and ".join(found) if found else ""


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is the memory of this machine or of its GPU that there is too little of."""
    said = isinstance(error, RuntimeError) and str(error)
    return isinstance(error, MemoryError) or said and any(
        words in said for words in ("can't allocate memory", "out of memory", "ALLOC_FAILED"))


@contextlib.contextmanager
def memory_advice(config: Any, n_labels: int) -> Iterator[None]:
    """Turn running out of memory in here into a UserError with the sizes that matter and the flags that lower them."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or "no more is to be had").splitlines()[0]
        flags = {"batch_size": "documents in a batch", "max_len": "tokens of a document at most",
                 "topk": "clusters kept per level"}
        sizes = [f"--{key.replace('_', '-')} {getattr(config, key)} ({what})" for key, what in flags.items()
                 if getattr(config, key, None)]
        more = "; --label-bf16 halves the weights of the labels" if hasattr(config, "label_bf16") else ""
        raise UserError(f"out of memory ({reason}) with {n_labels:,} labels; lower {', '.join(sizes)}{more}") from error


def need_space(folder: Path, n_bytes: float, replaced: tuple[str, ...] = (), advice: str = "") -> None:
    """UserError unless the folder can be written to and has room for that much, in place of the files `replaced`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise UserError(f"--run {folder}: cannot be written to ({error}); choose another folder") from None
    free += sum(path.stat().st_size for name in replaced for path in folder.glob(name))
    if free < n_bytes:
        raise UserError(f"--run {folder}: this stage writes about {n_bytes / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB "
                        f"are free; make room, or choose another folder{advice and f'; {advice}'}")


def room_for_training(folder: Path, model: torch.nn.Module, cache: int) -> None:
    """UserError unless three checkpoints, with AdamW's moments, and two models can be written, as happens in a save,
    and `cache` bytes of features for the heads."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    advice = f"or do without the features for the heads, {cache / 2**20:,.0f} MiB: --head-epochs 0" if cache else ""
    need_space(folder, 11 * size + cache, ("checkpoint*", "model.pt*"), advice)
