"""What a training step costs: against the encoder alone, against the number of labels, against the
usual way.

    python bench/step.py                    small sizes, two or three minutes on two CPU cores
    python bench/step.py --device cuda      BERT-base, 128 tokens, batches of 64, to 3M labels

Weights, texts and labels are random, lengths are not. Shortlists are drawn at random, so that a
batch touches as many clusters as it can, the most expensive case. Beside the usual way they are
also left alike, the cheapest. Every ratio is of medians over steps taken in turn in this process.
"Usual way" is what the class Usual says. On a GPU our steps come twice: asked for by Python one
operation after the other, and recorded (04_train.py --graphs).
"""

import argparse
import ctypes
import gc
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from common import Report, peak_bytes, random_data, random_model, spread_shortlists, stages
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from plumbing.cuda_graphs import TOKENS, RecordedSteps
from plumbing.label_level import RowAdam
from plumbing.precision import in_turn, set_up_torch

# (labels, clusters per level, clusters kept per level). The biggest has the cluster levels that are
# published for Amazon-3M. On a GPU 670,091 labels come twice: as published, and with the default of
# this project.
SIZES = {
    "cpu": [
        (131072, [1024, 16384], [128, 256]),
        (670091, [1024, 8192, 65536], [128, 128, 256]),
        (2812281, [1024, 8192, 131072], [128, 128, 256]),
    ],
    "cuda": [
        (131072, [1024, 16384], [256, 400]),
        (670091, [1024, 8192, 65536], [128, 256, 400]),
        (670091, [1024, 8192, 65536], [192, 384, 768]),
        (2812281, [1024, 8192, 131072], [128, 256, 512]),
    ],
    "toy": [
        (512, [16, 64], [8, 8]),
        (4096, [16, 64, 512], [8, 8, 8]),
    ],
}
SHAPE = {
    "cpu": {"depth": 2, "width": 128, "batch": 32, "tokens": 128},
    "cuda": {"depth": 12, "width": 768, "batch": 64, "tokens": 128},
}
REPEAT = {"cpu": 1, "cuda": 5}  # steps between two looks at the clock: a GPU is kept busy
DOCUMENTS = 20000  # of the random corpus


# 1. Our step, and the step of the encoder alone.


def optimizers_of(model) -> list[torch.optim.Optimizer]:
    """As 04_train.py makes them: AdamW, and RowAdam for the labels."""
    groups = model.param_groups(1e-3, 1e-4)
    dense_groups = [group for group in groups if not group["rows"]]
    row_groups = [group for group in groups if group["rows"]]
    adam = torch.optim.AdamW(dense_groups, fused=True)
    if not row_groups:
        return [adam]
    return [adam, RowAdam(row_groups)]


def step(model, optimizers: list, amp: str, batch) -> tuple[torch.Tensor]:
    """One training step."""
    model.amp = amp
    losses, _ = model.loss(batch)
    losses.sum().backward()
    dense_parameters = []
    for group in optimizers[0].param_groups:
        dense_parameters.extend(group["params"])
    nn.utils.clip_grad_norm_(dense_parameters, stages.train.CLIP)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return (losses.detach(),)


def encoder_step(model, optimizer, amp: str, batch) -> tuple[torch.Tensor]:
    """The same batch through the encoder alone, with the gradient of a plain sum."""
    model.amp = amp
    total = sum(x_BD.sum() for x_BD in model.features(batch))
    total.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], stages.train.CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return (total.detach(),)


def recorded(run: Callable, optimizers: list, n_documents: int) -> RecordedSteps:
    """The same steps, replayed by the GPU."""

    def groups() -> list[dict]:
        return [group for optimizer in optimizers for group in optimizer.param_groups]

    return RecordedSteps(run, groups, n_documents, torch.device("cuda"))


def often(run: Callable, device: str) -> Callable[[], None]:
    """A pass of several steps. A single step would measure how long it takes to start it."""

    def several() -> None:
        for _ in range(REPEAT[device]):
            run()

    return several


# 2. The usual way.


class Usual(nn.Module):
    """The cascade in the way of the authors' code, around the same encoder.

    Their code: github.com/xmc-aalto/cascadexml, src/CascadeXML.py and Runner.py. What is theirs:

    - Every level, also the first one, is an embedding, gathered candidate by candidate for every
      document. Here that includes AdamW over all weights. (For Amazon-3M they advise SparseAdam.)
    - Loops over the documents take out the empty places of clusters, and match the labels.
    - Shorter shortlists are padded, and the padding counts in the loss.
    - A step waits for its loss and for its own P@5, which is counted document by document.
    - The gradient is not clipped. AdamW does one operation after the other: theirs comes from old
      releases of transformers, and torch's with foreach=False is the same.

    Spared: what their data loader does in processes of its own, their loss scaling, and scores that
    only prediction needs.
    """

    def __init__(self, model, n_labels: int) -> None:
        super().__init__()
        self.base = model
        slots = model.slot_to_label
        device = slots.device
        width = model.heads[0].weight.shape[2]
        # 1. The children of every node, level by level. n_labels stands for "none".
        counts = [*model.counts[1:-1], n_labels]  # nodes per level; the last ones are the labels
        nodes = [torch.arange(n, device=device) for n in counts[1:-1]]
        nodes.append(slots.where(slots >= 0, n_labels))
        self.below = []
        for n, below in zip(counts, nodes, strict=False):
            self.below.append(below.view(n, -1))
        # 2. Weights and biases, one embedding per level.
        del model.heads[1:]  # the first one says what type features have
        self.weights = nn.ModuleList()
        self.biases = nn.ModuleList()
        for n in (*counts[:-1], n_labels + 1):
            self.weights.append(nn.Embedding(n, width, device=device))
            self.biases.append(nn.Embedding(n, 1, device=device))
            nn.init.normal_(self.weights[-1].weight, std=0.02)

    def positives(self, batch) -> list[list]:
        """The positive nodes of each document at each level. Their data loader gives them with the
        batch.
        """
        slot_P = self.base.label_to_slot[batch.label_P]
        node_P_by_level = []
        for n in self.base.counts[1:-1]:
            node_P_by_level.append(slot_P // (self.base.counts[-1] // n))
        node_P_by_level.append(batch.label_P)
        result = []
        for node_P in node_P_by_level:
            of_level = [node_P[batch.doc_P == b].unique() for b in range(len(batch.ids_BT))]
            result.append(of_level)
        return result

    def forward(self, batch, positives) -> tuple:
        """(loss, probabilities (B, K) per level, candidates (B, K) per level)."""
        loss = 0.0
        logits_BK = None
        targets_BK = None
        probabilities = []
        candidates = []
        first_level = torch.arange(len(self.weights[0].weight), device=batch.ids_BT.device)
        nodes_BK = first_level.expand(len(batch.ids_BT), -1)
        for t, x_BD in enumerate(self.base.features(batch)):
            # 1. The candidates: the children of the nodes that are kept.
            if t > 0:
                places_BK = stages.model.shortlist(
                    logits_BK[..., None], targets_BK[..., None], self.base.topk[t - 1]
                )
                kept_BK = nodes_BK.gather(1, places_BK)
                nodes_BK = self.below[t - 1][kept_BK].flatten(1)
            # 2. Of labels, without the empty places, and padded again.
            rows = list(nodes_BK)
            empty = len(self.weights[t].weight) - 1
            if t == len(self.below):
                rows = [row[row != empty] for row in rows]
                nodes_BK = pad_sequence(rows, True, empty)
            # 3. Which candidates are correct?
            targets = []
            for row, nodes in zip(rows, positives[t], strict=True):
                is_positive = (row[:, None] == nodes).any(1)
                targets.append(is_positive.float())
            targets_BK = pad_sequence(targets, True)
            # 4. Logits and loss.
            x_BD = self.base.dropout[t](x_BD)
            weight_BKD = self.weights[t](nodes_BK)
            logits_BK = torch.bmm(weight_BKD, x_BD[..., None]).squeeze(2)
            logits_BK = logits_BK + self.biases[t](nodes_BK).squeeze(2)
            loss = loss + functional.binary_cross_entropy_with_logits(logits_BK, targets_BK)
            probabilities.append(logits_BK.detach().sigmoid())
            candidates.append(nodes_BK)
        return loss, probabilities, candidates


def usual_step(model: Usual, optimizer, batch, positives, amp: str) -> None:
    model.base.amp = amp
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    with torch.autocast(batch.ids_BT.device.type, dtype, enabled=dtype is not None):
        loss, probabilities, candidates = model(batch, positives)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss.item()  # wait
    # Correct predictions among the first 1 to 5, level by level, document by document.
    for p_BK, nodes_BK, positive in zip(probabilities, candidates, positives, strict=True):
        best_B5 = nodes_BK.gather(1, p_BK.topk(5).indices).cpu()
        correct = 0
        for found, nodes in zip(best_B5, positive, strict=True):
            is_correct = (found[:, None] == nodes.cpu()).any(1)
            correct = correct + is_correct.cumsum(0)


# 3. The label level alone.


def label_level_step(head, optimizer, x_BD, clusters_BK) -> None:
    head(x_BD, clusters_BK).sigmoid().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def label_level_pass(n_labels: int, shape: argparse.Namespace, device: str) -> Callable[[], None]:
    """A step of the label level. Shortlists are from 4,096 clusters, however many there are."""
    rng = np.random.default_rng(0)
    fan = 8
    n_clusters = n_labels // fan
    head = stages.model.Head(n_clusters, fan, shape.width, sparse=True).to(device)
    nn.init.normal_(head.weight, std=0.02)
    some = rng.choice(n_clusters, 4096, replace=False)
    shortlists = [rng.choice(some, 256, replace=False) for _ in range(shape.batch)]
    clusters_BK = torch.from_numpy(np.stack(shortlists)).to(device)
    x_BD = torch.randn(shape.batch, shape.width, device=device, requires_grad=True)
    optimizer = RowAdam([{"params": list(head.parameters())}])
    return partial(label_level_step, head, optimizer, x_BD, clusters_BK)


def label_level(shape, args, row) -> None:
    """A row for the number of labels, all else being equal.

    It comes last, because it changes how this process allocates memory: big blocks are kept. To
    give them back to the system now and then would hit one of the two sizes and not the other.
    """
    if args.device == "cpu":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
            libc.mallopt(-4, 0)  # M_MMAP_MAX
    few, many = 131072, 3145728
    if args.toy:
        few, many = 65536, 131072
    passes = {n: label_level_pass(n, shape, args.device) for n in (few, many)}
    seconds = in_turn(passes, 3 * args.rounds)
    what = f"label level, {many:,} labels / {few:,}, same shortlists"
    row(what, seconds[many] / seconds[few], "<= 1.10")


# 4. Batches.


def batch_of(data, batches, rows: np.ndarray, device: str):
    return data.batch("train", rows, int(batches.max_len)).to(device)


def of_all_lengths(batches, n: int) -> list[np.ndarray]:
    """The documents of n batches, from short to long. Of one batch: that of median length."""

    def longest(rows: np.ndarray) -> int:
        return batches.length_N[rows].max()

    by_length = sorted(batches.rows(0), key=longest)
    places = [(2 * i + 1) * len(by_length) // (2 * n) for i in range(n)]
    return [by_length[place] for place in places]


# 5. What is measured.


def measure(n_labels: int, levels: list[int], topk: list[int], shape, args, row) -> None:
    """Rows for a model of that many labels."""
    kept = ",".join(str(k) for k in topk)
    name = f"{n_labels:,} labels, {kept} kept"
    device = args.device
    data = random_data(DOCUMENTS, n_labels)
    batches = stages.train.Batches(data, shape.batch, shape.tokens, 0)
    typical = of_all_lengths(batches, 1)[0]
    fixed = batch_of(data, batches, typical, device)
    before = peak_bytes(lambda: None, device)
    model = random_model(n_labels, levels, topk, shape.depth, shape.width, shape.tokens, device)
    if args.compile:
        model.encoder.compile(dynamic=True)
    optimizers = optimizers_of(model)
    encoder_parameters = []
    for key, parameter in model.named_parameters():
        if key.startswith("encoder."):
            encoder_parameters.append(parameter)
    encoder_adam = torch.optim.AdamW(encoder_parameters, fused=True)

    # 1. A step, and a step of the encoder alone.
    whole = partial(step, model, optimizers, args.amp)
    encoder = partial(encoder_step, model, encoder_adam, args.amp)

    def against_encoder(rows: np.ndarray, length: str, whole: Callable, encoder: Callable) -> None:
        """Two rows: what the rest costs beside the encoder. A GPU's difference says more than a
        ratio, which is better the slower the encoder is.
        """
        batch = data.batch("train", rows, shape.tokens, batches.round_to)
        if not isinstance(whole, RecordedSteps):  # they take a batch that is still on the CPU
            batch = batch.to(device)
        passes = {
            "whole": often(partial(whole, batch), device),
            "encoder": often(partial(encoder, batch), device),
        }
        seconds = in_turn(passes, args.rounds)
        ratio = seconds["whole"] / seconds["encoder"]
        target = "GPU: <= 1.2 at 670K, <= 1.3 at 3M"
        row(f"{name}: full step / encoder-only step, {length}", ratio, target)
        difference = 1000 * (seconds["whole"] - seconds["encoder"]) / REPEAT[device]
        target = "GPU: <= 5 at 670K, <= 7 at 3M"
        row(f"{name}: full step - encoder-only step, {length}, ms", difference, target, ".1f")

    against_encoder(typical, "median length", whole, encoder)
    passes = {
        "resident": often(lambda: whole(fixed), device),
        "made": often(lambda: whole(batch_of(data, batches, typical, device)), device),
    }
    seconds = in_turn(passes, args.rounds)
    ratio = seconds["made"] / seconds["resident"]
    row(f"{name}: step with its batch made from flat ids / batch there already", ratio)
    # The same with documents of full length.
    longest = np.argsort(batches.length_N)[-shape.batch :]
    against_encoder(longest, f"{shape.tokens} tokens", whole, encoder)

    # 2. Speed over batches of all lengths.
    n = 2 * args.rounds * REPEAT[device]

    def speed(run: Callable) -> float:
        """Documents per second."""
        some = [*batches.rows(0), *batches.rows(1)][:n]

        def n_steps() -> None:
            for rows in some:
                run(data.batch("train", rows, shape.tokens, batches.round_to))

        n_steps()  # the first pass, and in_turn's own, meet every shape and record it
        return n * shape.batch / in_turn({"stream": n_steps}, 1)["stream"]

    what = f"documents per second, {n} batches of all lengths"
    row(f"{name}: {what}", speed(lambda batch: whole(batch.to(device))), "", ",.0f")

    # 3. Memory.
    encoder_adam.state.clear()  # its moments are no part of our step
    gc.collect()
    peak = peak_bytes(lambda: whole(fixed), device)
    if device == "cpu":
        peak -= before  # what the process had before there was a model
    held = sum(parameter.nbytes for parameter in model.parameters())
    for optimizer in optimizers:
        for state in optimizer.state.values():
            held += sum(value.nbytes for value in state.values() if torch.is_tensor(value))
    target = "GPU: <= 7 at 670K, <= 12 at 3M"
    row(f"{name}: peak memory of a step, GiB", peak / 2**30, target)
    row(f"{name}: of these weights and optimiser states, GiB", held / 2**30)
    if device == "cuda":
        # torch takes more from the device than tensors need, and keeps it for the next step.
        reserved = torch.cuda.max_memory_reserved()
        row(f"{name}: memory that torch reserved, this size or one before, GiB", reserved / 2**30)

    # 4. The same, recorded: --graphs.
    if device == "cuda":
        batches.round_to = TOKENS
        whole = recorded(whole, optimizers, shape.batch)
        encoder = recorded(encoder, [encoder_adam], shape.batch)
        against_encoder(typical, "median length, recorded", whole, encoder)
        against_encoder(longest, f"{shape.tokens} tokens, recorded", whole, encoder)
        row(f"{name}: {what}, recorded", speed(whole), "", ",.0f")
        allocated = torch.cuda.memory_allocated()
        row(f"{name}: memory with all recordings, between steps, GiB", allocated / 2**30)


def padding(shape, row) -> None:
    batches = stages.train.Batches(random_data(DOCUMENTS, 1000), shape.batch, shape.tokens, 0)
    real = batches.length_N.sum()
    padded = sum(batches.length_N[rows].max() * len(rows) for rows in batches.rows(0))
    row("real / padded tokens, length buckets", real / padded, ">= 0.97", ".3f")
    to_maximum = shape.tokens * len(batches.length_N)
    row("real / padded tokens, padded to the maximum", real / to_maximum, "", ".3f")


def against_usual(n_labels: int, levels: list[int], topk: list[int], shape, args, row) -> None:
    """Rows for the usual way, whose documents come in any order, padded to the maximum. Ours beside
    it has batches of all lengths.
    """
    data = random_data(DOCUMENTS, n_labels)
    batches = stages.train.Batches(data, shape.batch, shape.tokens, 0)
    sizes = (n_labels, levels, topk, shape.depth, shape.width, shape.tokens, args.device)
    ours = random_model(*sizes)
    optimizers = optimizers_of(ours)
    usual = Usual(random_model(*sizes), n_labels)
    adam = torch.optim.AdamW(usual.parameters(), foreach=False)

    drawn = np.random.default_rng(0).permutation(DOCUMENTS)[: shape.batch]
    plain = data.batch("train", drawn, shape.tokens)
    missing = shape.tokens - plain.ids_BT.shape[1]
    plain = plain._replace(
        ids_BT=functional.pad(plain.ids_BT, (0, missing)),
        mask_BT=functional.pad(plain.mask_BT, (0, missing)),
    ).to(args.device)
    positives = usual.positives(plain)
    rows_of = of_all_lengths(batches, 5)

    def one_usual() -> None:
        usual_step(usual, adam, plain, positives, args.amp)

    # Ours as it is on that device: on a GPU, recorded.
    on_gpu = args.device == "cuda"
    round_to = TOKENS if on_gpu else 1

    def all_ours() -> None:
        for rows in rows_of:
            batch = data.batch("train", rows, shape.tokens, round_to)
            one_of_ours(batch if on_gpu else batch.to(args.device))

    passes = {"usual": often(one_usual, args.device), "ours": all_ours}
    for spread, name in ((True, "at random"), (False, "alike")):
        spread_shortlists(spread)
        one_of_ours = partial(step, ours, optimizers, args.amp)
        if on_gpu:
            one_of_ours = recorded(one_of_ours, optimizers, shape.batch)
            all_ours()  # this meets every shape, and in_turn's first round records it
        seconds = in_turn(passes, max(1, args.rounds // 3))
        usual_seconds = seconds["usual"] / REPEAT[args.device]
        our_seconds = seconds["ours"] / len(rows_of)
        kept = ",".join(str(k) for k in topk)
        what = f"{n_labels:,} labels, {kept} kept: usual way / ours, shortlists {name}"
        row(what, usual_seconds / our_seconds, ">= 4 on a CPU, >= 5 on a GPU")
    spread_shortlists()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    amp_help = "precision of the encoder [off on a CPU, bf16 on a GPU]"
    compile_help = "the second size alone, with the encoder compiled"
    toy_help = "hundreds of labels: only to see that it runs"
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--amp", help=amp_help)
    parser.add_argument("--compile", action="store_true", help=compile_help)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each kind [15]")
    parser.add_argument("--toy", action="store_true", help=toy_help)
    parser.add_argument("--out", default="bench/results/step.json")
    args = parser.parse_args()
    args.amp = args.amp or {"cpu": "off", "cuda": "bf16"}[args.device]
    set_up_torch()
    spread_shortlists()
    shape = argparse.Namespace(**SHAPE[args.device])
    sizes = SIZES["toy" if args.toy else args.device]
    row = Report(args).row

    if args.compile:
        measure(*sizes[1], shape, args, row)
        return
    # From small to big, and the usual way after: memory that a process has had and freed would hide
    # what the next size takes.
    for size in sizes:
        measure(*size, shape, args, row)
    padding(shape, row)
    for size in sizes:
        against_usual(*size, shape, args, row)
    label_level(shape, args, row)


if __name__ == "__main__":
    main()
