"""How this machine computes: settings of torch, and the precision of the encoder."""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from plumbing.errors import UserError

PRECISIONS = ("bf16", "fp16", "off")


def set_up_torch() -> None:
    """Settings that every script wants, before it makes its first tensor."""
    # Big tensors in pages of 2 MB, where Linux has them. In small pages, weights take longer to
    # find the more there are. torch looks at this when the first tensor is made.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # After training, weights and optimiser states may hold denormal numbers, very close to 0. A CPU
    # multiplies them many times more slowly: make them 0.
    torch.set_flush_denormal(True)
    # On a GPU the float32 products of the heads use TF32, with ten bits to bfloat16's seven.
    torch.backends.cuda.matmul.allow_tf32 = True


def in_turn(passes: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """{name: median seconds} of some functions.

    They run in turn, so that what else the machine does hits all alike. The first round sets things
    up and is not counted. A GPU's work is waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds + 1):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times[1:])) for name, times in seconds.items()}


def has_bf16_arithmetic() -> bool | None:
    """Whether the processor itself computes in bfloat16; None where torch does not know."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return None
    flags = [has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name]
    return any(flags) if flags else None


def choose_amp(amp: str, model: Any, batch: Any) -> str:
    """The precision of the encoder, for model.amp. 'auto' becomes what is fast on this device."""
    if amp not in ("auto", *PRECISIONS):
        raise UserError(f"--amp {amp}: expected bf16, fp16, off or auto")
    if amp == "auto" and batch.ids_BT.is_cuda:
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "bf16" if has_bf16 else "fp16"
    elif amp == "auto":
        amp = fastest_on_cpu(model, batch)
    return amp


def fastest_on_cpu(model: Any, batch: Any) -> str:
    """bf16 if a forward and backward pass of the encoder is faster in it, otherwise off."""
    # Without bf16 arithmetic a processor imitates it. A trial would take half a minute to tell that
    # this is slow.
    if has_bf16_arithmetic() is False:
        print("precision: fp32, since this processor has no bf16 arithmetic")
        return "off"

    def encode(amp: str) -> None:
        model.amp = amp
        sum(x_BD.sum() for x_BD in model.features(batch)).backward()

    def in_fp32() -> None:
        encode("off")

    def in_bf16() -> None:
        encode("bf16")

    seconds = in_turn({"off": in_fp32, "bf16": in_bf16}, rounds=3)
    model.zero_grad()
    fp32 = 1000 * seconds["off"]
    bf16 = 1000 * seconds["bf16"]
    print(f"precision: one batch takes {fp32:.0f} ms in fp32 and {bf16:.0f} ms in bf16")
    return "bf16" if bf16 < fp32 else "off"
