"""Training and prediction on several GPUs, of one machine or of several, by torchrun.

    torchrun --nproc-per-node 4 04_train.py --run runs/mine
    torchrun --nproc-per-node 4 05_eval.py --run runs/mine

torchrun starts the script once for each device. Every process holds the whole model and takes its
share of the documents of every batch. So --batch-size is still the size of the whole batch, and a
step is the step that one device would take:

    encoder, cluster levels   the processes' gradients are added up, then each makes the same step
    labels                    their gradient is two small factors (plumbing/label_level.py): every
                              process gets those of all documents, then each makes the same step

So all processes hold the same weights at all times. The first one writes the files and speaks. In
validation and stage 5 each process predicts its share of the documents.

The label weights are replicated, not divided among the devices: what fits on one device fits, and
no more (docs/scaling.md).

With a single process nothing here does anything.
Shapes   B documents of a batch
"""

import os
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, distributed

from plumbing.errors import UserError

# 1. Who are we?


def join(may: bool) -> None:
    """Meet the other processes, if torchrun started several. UserError unless the script `may`."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if not may:
        raise UserError("torchrun is for 04_train.py and 05_eval.py; start this script by python")
    # Optimisers import this module at their first step. Its functions would then hold the
    # connection to the other processes as a default value, so that leave() could not close it, and
    # a thread of the connection could crash while Python ends. Imported before there is one, they
    # hold none.
    import torch.distributed.nn.functional  # noqa: F401

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("cpu:gloo,cuda:nccl")
    else:
        distributed.init_process_group("gloo")
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, as long as the process lives
        os.environ["TQDM_DISABLE"] = "1"


def leave() -> None:
    """The counterpart of join, when everything has gone well."""
    if n_processes() > 1:
        distributed.destroy_process_group()


def n_processes() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def number() -> int:
    """0 for the first process."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first() -> bool:
    return number() == 0


# 2. Sharing the documents.


def share(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """(the documents of this process, their share of all).

    Where there are fewer documents than processes, some would have none. They take the first
    document, too, and their share is 0.
    """
    own = rows[number() :: n_processes()]
    if len(own) == 0:
        return rows[:1], 0.0
    return own, len(own) / len(rows)


# 3. Putting together what the processes have found.


def add_up(tensors: list[Tensor]) -> None:
    """Replace the tensors by their sums over all processes."""
    if n_processes() == 1 or not tensors:
        return
    # One message for all: many small ones would take longer.
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def gather(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor (B, ...) with those of the other processes below it, in the order of processes.

    All have the same B in a process, which may differ between processes.
    """
    if n_processes() == 1:
        return tensors
    # 1. How many documents does each process have? (On the CPU: no GPU is waited for.)
    own_size = torch.tensor([len(tensors[0])])
    sizes = [torch.zeros_like(own_size) for _ in range(n_processes())]
    distributed.all_gather(sizes, own_size)
    sizes = [int(size) for size in sizes]
    gathered = []
    for tensor in tensors:
        # 2. Messages must be of one size, so the shorter ones are padded.
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(n_processes())]
        distributed.all_gather(parts, padded)
        # 3. Without the padding, one below the other.
        kept = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        gathered.append(torch.cat(kept))
    return gathered


def gather_arrays(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The same for arrays."""
    if n_processes() == 1:
        return arrays
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    return [tensor.numpy() for tensor in gather(tensors)]


def own_row(rows: Tensor) -> Tensor:
    """This process' row of those that `gather` put together, when a training goes on.

    With another number of processes than there was then, the first one takes the sum of all rows.
    """
    if len(rows) == n_processes():
        return rows[number()]
    total = rows.sum(dim=0)
    return total if is_first() else torch.zeros_like(total)


def agreed(stop: Callable[[], bool]) -> Callable[[], bool]:
    """A function that says whether any process was asked to stop: all must call it together."""
    if n_processes() == 1:
        return stop

    def any_was_asked() -> bool:
        asked = torch.tensor([int(stop())])
        distributed.all_reduce(asked)
        return bool(asked)

    return any_was_asked


def as_the_first_says(choices: tuple[str, ...], own: str) -> str:
    """One of the choices: what the first process has chosen."""
    if n_processes() == 1:
        return own
    place = torch.tensor([choices.index(own)])
    distributed.broadcast(place, src=0)
    return choices[int(place)]


def wait_for_all() -> None:
    """Go on when all processes have come here."""
    if n_processes() > 1:
        distributed.barrier()
