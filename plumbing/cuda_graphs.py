"""Training steps that a GPU replays: `04_train.py --graphs`.

A step consists of some fifteen hundred operations, most of them small. To ask a GPU for one of them
takes Python about as long as the GPU needs to do it, or longer. Then the GPU waits for Python. A
CUDA graph is a recording of all that Python asks for in a step. It is replayed by a single request.

A recording remembers shapes and addresses, but no Python. That has three consequences:

    shapes      Batches are padded to one of a few shapes (`padded`, and Data.batch(round_to=...)).
                Each shape has a recording of its own. A batch with fewer documents than usual, at
                the end of an epoch, takes its step without one.
    addresses   A recording reads its batch, and the learning rates, from tensors of its own. What
                is new is copied there before a replay.
    Python      A number or a branch that Python computed while the step was recorded stays as it
                was. So a loss that changes from step to step must keep what changes in a tensor.

Only what never asks the GPU for a number can be recorded.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plumbing import several_devices
from plumbing.errors import UserError

TOKENS = 16  # lengths of documents are rounded up to a multiple of this
PAIRS = 256  # pairs (document, label) of a batch: this many, or twice, four times, ... as many


def refuse_what_cannot_be_recorded(config: Any, device: torch.device) -> None:
    """UserError where something stands in the way of --graphs."""
    n_processes = several_devices.n_processes()
    in_the_way = {
        "it needs a CUDA device": device.type != "cuda",
        "not with --accumulate, since a recording is a whole step of one batch": (
            config.accumulate > 1
        ),
        "not with fp16, whose scale of the loss Python looks at in every step": (
            config.amp == "fp16"
        ),
        "not with --label-bf16, whose noise depends on the step": config.label_bf16,
        "not with several GPUs, which talk to each other in every step": n_processes > 1,
    }
    for reason, is_so in in_the_way.items():
        if is_so:
            raise UserError(f"--graphs: {reason}; leave --graphs out")


def padded(batch: Any) -> Any:
    """The batch with a round number of pairs: its last pair again and again, which says nothing."""
    n_pairs = len(batch.doc_P)
    wanted = PAIRS
    while wanted < n_pairs:
        wanted *= 2
    pair = torch.arange(wanted).clamp(max=n_pairs - 1)
    return batch._replace(doc_P=batch.doc_P[pair], label_P=batch.label_P[pair])


def tensors_of(batch: Any) -> list[Tensor]:
    return [field for field in batch if isinstance(field, Tensor)]


@dataclass
class Recording:
    graph: Any  # torch.cuda.CUDAGraph
    batch: Any  # what it reads
    found: tuple[Tensor, ...]  # what it writes; the next replay writes over it


class RecordedSteps:
    """step(batch) -> tensors, on a GPU: replayed where a batch of the same shape was recorded.

    `step` computes the gradient, moves the weights, and leaves no gradient behind. `groups` gives
    the parameter groups of its optimisers.
    """

    def __init__(
        self,
        step: Callable[[Any], tuple[Tensor, ...]],
        groups: Callable[[], list[dict]],
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.step = step
        self.groups = groups
        self.batch_size = batch_size
        self.device = device
        # A learning rate is a number that Python computes, so a recording has it as a tensor.
        self.rates = [torch.zeros((), device=device) for _ in groups()]
        self.met: set[tuple] = set()  # shapes that came once
        self.recordings: dict[tuple, Recording] = {}
        self.memory = None  # all recordings share theirs, since only one is replayed at a time

    def __call__(self, batch: Any) -> tuple[Tensor, ...]:
        """A step on a batch that is still on the CPU. Use what it returns before the next step."""
        # 1. Batches that are no step of the usual size.
        if len(batch.ids_BT) != self.batch_size or len(batch.doc_P) == 0:
            return self.step(batch.to(self.device))
        batch = padded(batch)
        shapes = tuple(tensor.shape for tensor in tensors_of(batch))
        # 2. The first step with a shape is not recorded: libraries choose their algorithms in it,
        #    and optimisers make their states.
        if shapes not in self.met:
            self.met.add(shapes)
            return self.step(batch.to(self.device))
        # 3. The second is recorded, which does not yet compute anything.
        if shapes not in self.recordings:
            self.recordings[shapes] = self.record(batch.to(self.device))
        # 4. From now on: put the batch and the rates where the recording reads them, and replay.
        recording = self.recordings[shapes]
        for place, new in zip(tensors_of(recording.batch), tensors_of(batch), strict=True):
            if place.is_cuda:
                new = new.pin_memory()  # of such memory a copy needs nobody to wait for it
            place.copy_(new, non_blocking=True)
        for rate, group in zip(self.rates, self.groups(), strict=True):
            rate.fill_(group["lr"])
        recording.graph.replay()
        return recording.found

    def record(self, batch: Any) -> Recording:
        """Record a step on a batch. UserError if it asks the GPU for a number."""
        graph = torch.cuda.CUDAGraph()
        try:
            with self.rates_as_tensors(), torch.cuda.graph(graph, pool=self.memory):
                found = self.step(batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--graphs: a step of this model cannot be recorded ({reason}); train without it"
            ) from error
        self.memory = graph.pool()
        return Recording(graph, batch, found)

    @contextlib.contextmanager
    def rates_as_tensors(self) -> Iterator[None]:
        """While a step is recorded, optimisers read their rates from tensors, and are told so."""
        before = [dict(group) for group in self.groups()]
        for group, rate in zip(self.groups(), self.rates, strict=True):
            group["lr"] = rate
            group["capturable"] = True  # torch's AdamW refuses to be recorded without this
        try:
            yield
        finally:
            for group, old in zip(self.groups(), before, strict=True):
                group.clear()
                group.update(old)
