"""Stops a training that has gone wrong."""

import collections
import math

import numpy as np
import torch
from torch import nn

from plumbing.errors import UserError


class LossWatch:
    """Stops a training whose loss is no longer finite, or grows a thousandfold.

    What a step gives is looked at while the next one is computed, so that a GPU is never waited for with nothing to do.
    """

    STEPS = 100  # the last losses of a level, whose median counts as usual
    GROWTH = 1000  # times the usual loss: no batch is that much harder than others

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pending = None
        self.first = None
        self.last = collections.deque(maxlen=self.STEPS)

    def __call__(self, losses: torch.Tensor, norm: torch.Tensor, step: int, lr: float) -> None:
        """Look at what came before; take the losses (levels,) and the gradient's norm () of this step."""
        self.check()
        copy = torch.cat([losses, norm.view(1)]).to("cpu", non_blocking=True)
        there = torch.cuda.Event() if losses.is_cuda else None
        if there:
            there.record()
        self.pending = copy, there, step, lr

    def check(self) -> None:
        """UserError when what came last is not finite, or far beyond what it was."""
        if self.pending is None:
            return
        copy, there, step, lr = self.pending
        self.pending = None
        if there:
            there.synchronize()
        *losses, norm = copy.tolist()
        for level, loss in enumerate(losses):
            if not math.isfinite(loss):
                self.stop(f"the loss of level {level + 1} of {len(losses)} is no longer finite", level, step, lr)
        if not math.isfinite(norm):
            self.stop("the gradient is no longer finite", None, step, lr)
        if self.first is None:
            self.first = losses
        usual = np.median(self.last, axis=0) if self.last else self.first
        for level, loss in enumerate(losses):
            if loss > self.GROWTH * usual[level] and loss > self.first[level]:
                self.stop(f"the loss of level {level + 1} of {len(losses)} is {loss:.3g}, more than a thousand times "
                          f"its median of the last {len(self.last)} steps, {usual[level]:.3g}", level, step, lr)
        self.last.append(losses)

    def state_dict(self) -> dict:
        """What was seen so far, for a training that goes on later."""
        return {"first": self.first, "last": list(self.last)}

    def load_state_dict(self, state: dict) -> None:
        self.first = state["first"]
        self.last.extend(state["last"])

    def stop(self, what: str, level: int | None, step: int, lr: float) -> None:
        """UserError that says what happened, where, and what to do."""
        heads = getattr(self.model, "heads", None)
        part = self.model if level is None or heads is None or level >= len(heads) else heads[level]
        largest = max(float(parameter.detach().abs().max()) for parameter in part.parameters())
        raise UserError(f"{what}: step {step}, learning rate {lr:.1e}, largest weight {largest:.1e}; the checkpoints "
                        "are those of before. Start over with a lower --lr or --lr-encoder (of the heads alone: "
                        "--head-lr), after deleting them")
