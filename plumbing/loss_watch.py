"""Stops a training that has gone wrong: its loss is not finite, or has grown a thousandfold."""

import collections
import math

import numpy as np
import torch
from torch import nn

from plumbing.errors import UserError


class LossWatch:
    """Looks at the losses of a step while the next step is computed.

    So a GPU is never waited for while it has nothing to do.
    """

    STEPS = 100  # the last losses of a level, whose median counts as usual
    GROWTH = 1000  # times the usual loss
    # A batch may be a single document, and a hard one among easy ones. So the loss must also be
    # this many times the largest of the first step and of all that are no longer among the last.
    BEYOND = 10

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pending = None  # numbers on their way from the device
        self.first = None  # losses (levels,): the largest of the first step and of the older ones
        self.last = collections.deque(maxlen=self.STEPS)

    def __call__(self, losses: torch.Tensor, norm: torch.Tensor, step: int, lr: float) -> None:
        """Look at the step before; take the losses (levels,) and the gradient's norm () of this."""
        self.check()
        on_its_way = torch.cat([losses, norm.view(1)]).to("cpu", non_blocking=True)
        arrival = None
        if losses.is_cuda:
            arrival = torch.cuda.Event()
            arrival.record()
        self.pending = on_its_way, arrival, step, lr

    def check(self) -> None:
        """UserError when what came last is not finite, or far beyond what is usual."""
        if self.pending is None:
            return
        numbers, arrival, step, lr = self.pending
        self.pending = None
        if arrival:
            arrival.synchronize()
        *losses, norm = numbers.tolist()
        n_levels = len(losses)

        for level, loss in enumerate(losses):
            if not math.isfinite(loss):
                what = f"the loss of level {level + 1} of {n_levels} is no longer finite"
                self.stop(what, level, step, lr)
        if not math.isfinite(norm):
            self.stop("the gradient is no longer finite", None, step, lr)

        if self.first is None:
            self.first = losses
        usual = np.median(self.last, axis=0) if self.last else self.first
        for level, loss in enumerate(losses):
            has_grown = loss > self.GROWTH * usual[level]
            if has_grown and loss > self.BEYOND * self.first[level]:
                what = (
                    f"the loss of level {level + 1} of {n_levels} is {loss:.3g}, more than a "
                    f"thousand times its median of the last {len(self.last)} steps, "
                    f"{usual[level]:.3g}"
                )
                self.stop(what, level, step, lr)
        if len(self.last) == self.STEPS:
            self.first = np.maximum(self.first, self.last[0]).tolist()
        self.last.append(losses)

    def stop(self, what: str, level: int | None, step: int, lr: float) -> None:
        """UserError that says what happened, where, and what to do."""
        heads = getattr(self.model, "heads", None)
        part = self.model
        if level is not None and heads is not None and level < len(heads):
            part = heads[level]
        largest = max(float(parameter.detach().abs().max()) for parameter in part.parameters())
        raise UserError(
            f"{what}: step {step}, learning rate {lr:.1e}, largest weight {largest:.1e}; the "
            "checkpoints are those of before. Start over with a lower --lr or --lr-encoder (of the "
            "heads alone: --head-lr), after deleting them"
        )

    def state_dict(self) -> dict:
        """What was seen so far, for a training that goes on later."""
        return {"first": self.first, "last": list(self.last)}

    def load_state_dict(self, state: dict) -> None:
        self.first = state["first"]
        self.last.extend(state["last"])
