"""How this machine computes: settings of torch, and the precision of the encoder."""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from plumbing.errors import UserError


def set_up_torch() -> None:
    """After training, weights and optimiser states may hold denormal numbers, which a CPU multiplies many times more
    slowly: flush them to zero. Let big tensors lie in pages of 2 MB where Linux has them: in small ones, weights take
    longer to find the more there are. On a GPU float32 products, in the heads, use TF32: ten bits to bfloat16's 7."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch looks at it when the first tensor is made
    torch.set_flush_denormal(True)
    torch.backends.cuda.matmul.allow_tf32 = True


def in_turn(passes: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """{name: median seconds}: the passes run in turn, so that what else the machine does hits all alike; the first
    round, which sets things up, is not counted. A GPU's work is waited for."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds + 1):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times[1:])) for name, times in seconds.items()}


def choose_amp(amp: str, model: Any, batch: Any) -> str:
    """Set model.amp, and return it: 'auto' is bf16 or fp16 on a GPU; on a CPU bf16 only if a forward and backward pass
    of the encoder is faster so."""

    def encode(amp: str) -> None:
        model.amp = amp
        sum(x_BD.sum() for x_BD in model.features(batch)).backward()

    if amp not in ("auto", "bf16", "fp16", "off"):
        raise UserError(f"--amp {amp}: expected bf16, fp16, off or auto")
    if amp == "auto" and batch.ids_BT.is_cuda:
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":
        seconds = in_turn({"off": lambda: encode("off"), "bf16": lambda: encode("bf16")}, rounds=3)
        model.zero_grad()
        fp32, bf16 = (1000 * seconds[amp] for amp in ("off", "bf16"))
        print(f"precision: one batch takes {fp32:.0f} ms in fp32 and {bf16:.0f} ms in bf16")
        amp = "bf16" if bf16 < fp32 else "off"
    model.amp = amp
    return amp
