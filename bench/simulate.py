"""What a training step would cost on a GPU that is not there: SIMULATED memory, traffic and time.

    python bench/simulate.py                                     670,091 and 2,812,281 labels
    python bench/simulate.py --labels 670091 --levels 1024,8192,65536 --topk 128,256,400 --bf16

BERT-base on fake tensors (bench/fake_cuda.py). Memory is the sum of all tensors that live at a
time, in the blocks of torch's allocator; on an H100 it was right within a tenth (bench/README.md).
Time is a roofline: each operation takes as long as its bytes, its FLOPs or its launch, whichever is
the longest, at the rates of the card that the flags describe. It is a bound from below, for a GPU
that never waits for Python. A real step is slower, and this table says what of it could be saved.
"""

import argparse
import contextlib
from unittest import mock

import torch
from common import stages
from fake_cuda import Meter, fake_cascade, fake_cuda, install

from plumbing.label_level import RowAdam, ShortlistProduct

GIB = 2**30
# (labels, clusters per level, clusters kept): the published shortlists, and this project's default.
SIZES = [
    (670_091, [1024, 8192, 65536], [128, 256, 400]),
    (670_091, [1024, 8192, 65536], [192, 384, 768]),
    (2_812_281, [1024, 8192, 131072], [128, 256, 512]),
]
ENCODER = ("encoder forward", "encoder backward")


def counted(meter: Meter, part: str, run):
    """The function, and what it does counts as this part of a step."""

    def wrapped(*args, **kwargs):
        with meter.during(part):
            return run(*args, **kwargs)

    return wrapped


def simulate(size: tuple, args: argparse.Namespace) -> tuple[Meter, Meter]:
    """Meters of a whole step, and of a step of the encoder alone."""
    n_labels, levels, topk = size
    card = {
        "bytes_per_s": 1e12 * args.tb_per_s,
        "flops16": 1e12 * args.tflops,
        "flops32": 1e12 * args.tflops_tf32,
        "launch": 1e-6 * args.launch_us,
    }
    with fake_cuda(), contextlib.ExitStack() as stack:
        model = fake_cascade(n_labels, levels, topk, label_bf16=args.bf16).train()
        model.amp = "bf16"
        meter = Meter(card)
        # The label level is in the midst of forward and backward: tell it apart there.
        for name in ("forward", "backward"):
            run = counted(meter, f"label level {name}", getattr(ShortlistProduct, name))
            stack.enter_context(mock.patch.object(ShortlistProduct, name, staticmethod(run)))
        model.features = counted(meter, "encoder forward", model.features)
        for tensor in (*model.parameters(), *model.buffers()):
            meter.hold(tensor)
        groups = model.param_groups(1e-3, 1e-4)
        dense_groups = [group for group in groups if not group["rows"]]
        adam = torch.optim.AdamW(dense_groups, fused=True, betas=(0.9, 0.99))
        row_adam = RowAdam([group for group in groups if group["rows"]])
        dense = [parameter for group in dense_groups for parameter in group["params"]]
        ids_BT = torch.zeros(args.batch, args.tokens, dtype=torch.long, device="cuda")
        pairs = torch.zeros(5 * args.batch, dtype=torch.long, device="cuda")
        batch = stages.data.Batch(ids_BT, torch.ones_like(ids_BT), pairs, pairs)

        def whole_step() -> None:
            with meter.during("clusters, targets, loss"):
                losses, _ = model.loss(batch)
            with meter.during("encoder backward"):
                losses.sum().backward()
            with meter.during("clip"):
                torch.nn.utils.clip_grad_norm_(dense, 10.0)
            with meter.during("AdamW"):
                adam.step()
            with meter.during("RowAdam"):
                row_adam.step(scale=torch.ones((), device="cuda"))
            adam.zero_grad()

        # The first step makes the optimisers' states; the second is an ordinary one.
        with meter:
            whole_step()
            meter.reset()
            whole_step()

        # The encoder alone, with its own clipping and AdamW.
        encoder_parameters = list(model.encoder.parameters())
        alone = torch.optim.AdamW(encoder_parameters, fused=True)
        only = Meter(card)
        with only:
            for _ in range(2):
                only.reset()
                sum(x_BD.sum() for x_BD in model.features(batch)).backward()
                torch.nn.utils.clip_grad_norm_(encoder_parameters, 10.0)
                alone.step()
                alone.zero_grad()
    return meter, only


def milliseconds(meter: Meter) -> float:
    return 1000 * sum(cost.seconds for cost in meter.costs.values())


def show(size: tuple, args: argparse.Namespace) -> None:
    n_labels, levels, topk = size
    meter, only = simulate(size, args)
    rows = "bf16" if args.bf16 else "fp32"
    print(f"\nSIMULATED: {n_labels:,} labels, levels {levels}, topk {topk}, {rows} rows; ", end="")
    print(f"batch {args.batch} x {args.tokens} tokens")
    print(f"{'':28}{'GB':>8}{'TFLOP':>8}{'launches':>10}{'ms':>8}")
    for part, cost in meter.costs.items():
        ms = 1000 * cost.seconds
        gb = cost.bytes / 1e9
        print(f"{part:28}{gb:8.2f}{cost.flops / 1e12:8.3f}{cost.launches:10}{ms:8.2f}")
    step = milliseconds(meter)
    encoder = milliseconds(only)
    print(
        f"step {step:.1f} ms, encoder alone {encoder:.1f}, difference {step - encoder:.1f}, ratio "
        f"{step / encoder:.2f}; peak {meter.peak / GIB:.2f} GiB"
    )


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=int, default=0, help="one size instead of three")
    parser.add_argument("--levels", type=numbers, help="clusters per level [as stage 2 chooses]")
    parser.add_argument("--topk", type=numbers, default=[192, 384, 768], help="[192,384,768]")
    parser.add_argument("--tokens", type=int, default=128, help="of every document [128]")
    parser.add_argument("--batch", type=int, default=64, help="documents [64]")
    parser.add_argument("--bf16", action="store_true", help="label rows in bf16")
    parser.add_argument("--tb-per-s", type=float, default=3.0, help="memory, TB/s [3.0, an H100]")
    parser.add_argument("--tflops", type=float, default=400, help="16-bit products [400]")
    parser.add_argument("--tflops-tf32", type=float, default=200, help="float32 products [200]")
    parser.add_argument("--launch-us", type=float, default=1.5, help="of a kernel, at least [1.5]")
    args = parser.parse_args()
    install()
    sizes = SIZES
    if args.labels:
        sizes = [(args.labels, args.levels or stages.tree.choose_levels(args.labels), args.topk)]
    for size in sizes:
        show(size, args)


if __name__ == "__main__":
    main()
