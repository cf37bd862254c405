"""What a training step costs: against the encoder alone, against the number of labels, against the usual way.

    python bench/step.py                    small sizes, two or three minutes on two CPU cores
    python bench/step.py --device cuda      BERT-base, 128 tokens, batches of 64, up to 3 million labels

Weights, texts and labels are random, lengths are not. Shortlists are drawn at random, so that a batch touches as many
clusters as it can, the most expensive case; beside the usual way also left alike, the cheapest. Every ratio is of
medians over steps taken in turn in this process. "Usual way" is what the class of that name says.
"""

import argparse
import ctypes
import gc
from functools import partial
from itertools import count

import numpy as np
import torch
from common import Report, peak_bytes, random_data, random_model, spread_shortlists, stages
from torch.nn.utils.rnn import pad_sequence

from plumbing.label_level import RowAdam
from plumbing.precision import in_turn, set_up_torch

# labels: (clusters per level, clusters kept per level); the biggest with cluster levels as published for Amazon-3M
SIZES = {
    "cpu": {131072: ([1024, 16384], [128, 256]), 670091: ([1024, 8192, 65536], [128, 128, 256]),
            2812281: ([1024, 8192, 131072], [128, 128, 256])},
    "cuda": {131072: ([1024, 16384], [256, 400]), 670091: ([1024, 8192, 65536], [128, 256, 400]),
             2812281: ([1024, 8192, 131072], [128, 256, 400])},
    "toy": {512: ([16, 64], [8, 8]), 4096: ([16, 64, 512], [8, 8, 8])},
}
SHAPE = {"cpu": {"depth": 2, "width": 128, "batch": 32, "tokens": 128},
         "cuda": {"depth": 12, "width": 768, "batch": 64, "tokens": 128}}
REPEAT = {"cpu": 1, "cuda": 5}  # steps between two looks at the clock: a GPU is kept busy


def optimizers_of(model) -> list[torch.optim.Optimizer]:
    """As fit() makes them."""
    groups = model.param_groups(1e-3, 1e-4)
    rows = [group for group in groups if group["rows"]]
    adam = torch.optim.AdamW([group for group in groups if group not in rows], fused=True)
    return [adam, *([RowAdam(rows)] if rows else [])]


def step(model, optimizers, next_batch, amp: str) -> None:
    model.amp = amp
    model.loss(next_batch())[0].sum().backward()
    dense = [parameter for group in optimizers[0].param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(dense, stages.train.CLIP)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def encoder_step(model, optimizer, batch, amp: str) -> None:
    """The same batch through the encoder alone, with the gradient of a plain sum, and its update."""
    model.amp = amp
    sum(x_BD.sum() for x_BD in model.features(batch)).backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], stages.train.CLIP)
    optimizer.step()
    optimizer.zero_grad()


def often(run, device: str):
    """A pass of several steps, where a single one would measure how long it takes to start it."""
    return lambda: [run() for _ in range(REPEAT[device])]


class Usual(torch.nn.Module):
    """The cascade in the way of the authors' code (github.com/xmc-aalto/cascadexml, src/CascadeXML.py and Runner.py),
    around the same encoder. Every level, the first one, too, is an embedding, gathered candidate by candidate for each
    document; loops over the documents take out the empty places of clusters and match the labels; shorter shortlists
    are padded, and the padding counts in the loss; a step waits for its loss and for its own P@5, counted document by
    document; the gradient is not clipped, and AdamW goes over all weights, one operation after the other: theirs is
    that of old releases of transformers, which torch's is with foreach=False. (For Amazon-3M they advise SparseAdam.)
    Spared: what their data loader does in processes of its own, their loss scaling, scores for prediction alone."""

    def __init__(self, model, n_labels: int) -> None:
        super().__init__()
        self.base, slots = model, model.slot_to_label
        counts, width = [*model.counts[1:-1], n_labels], model.heads[0].weight.shape[2]
        nodes = [*(torch.arange(n, device=slots.device) for n in counts[1:-1]), slots.where(slots >= 0, n_labels)]
        self.below = [below.view(n, -1) for n, below in zip(counts, nodes, strict=False)]
        del model.heads[1:]  # the first one says what type features have
        with slots.device:
            self.weights, self.biases = (torch.nn.ModuleList(
                torch.nn.Embedding(n, d) for n in (*counts[:-1], n_labels + 1)) for d in (width, 1))
        for table in self.weights:
            torch.nn.init.normal_(table.weight, std=0.02)

    def positives(self, batch) -> list[list]:
        """The positive nodes of each document at each level: their data loader gives them with the batch."""
        slot_P = self.base.label_to_slot[batch.label_P]
        node_P = [slot_P // (self.base.counts[-1] // n) for n in self.base.counts[1:-1]] + [batch.label_P]
        return [[nodes[batch.doc_P == b].unique() for b in range(len(batch.ids_BT))] for nodes in node_P]

    def forward(self, batch, positives) -> tuple:
        """(loss, probabilities (B, K) per level, candidates (B, K) per level)."""
        loss, logits_BK, targets_BK, probabilities, candidates = 0.0, None, None, [], []
        nodes_BK = torch.arange(len(self.weights[0].weight), device=batch.ids_BT.device).expand(len(batch.ids_BT), -1)
        for t, x_BD in enumerate(self.base.features(batch)):
            if t > 0:
                places = stages.model.shortlist(logits_BK[..., None], targets_BK[..., None], self.base.topk[t - 1])
                nodes_BK = self.below[t - 1][nodes_BK.gather(1, places)].flatten(1)
            rows, empty = list(nodes_BK), len(self.weights[t].weight) - 1
            if t == len(self.below):
                rows = [row[row != empty] for row in rows]
                nodes_BK = pad_sequence(rows, True, empty)
            targets = [(row[:, None] == nodes).any(1).float() for row, nodes in zip(rows, positives[t], strict=True)]
            targets_BK = pad_sequence(targets, True)
            logits_BK = torch.bmm(self.weights[t](nodes_BK), self.base.dropout[t](x_BD)[..., None]).squeeze(2)
            logits_BK = logits_BK + self.biases[t](nodes_BK).squeeze(2)
            loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(logits_BK, targets_BK)
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
    loss.item()
    for p_BK, nodes_BK, positive in zip(probabilities, candidates, positives, strict=True):
        best_B5 = nodes_BK.gather(1, p_BK.topk(5).indices).cpu()
        sum((found[:, None] == nodes.cpu()).any(1).cumsum(0) for found, nodes in zip(best_B5, positive, strict=True))


def label_level_step(head, optimizer, x_BD, clusters_BK) -> None:
    head(x_BD, clusters_BK).sigmoid().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def label_level_pass(n_labels: int, shape: argparse.Namespace, device: str):
    """A pass of the label level alone, on shortlists from 4,096 clusters, however many labels there are."""
    rng, n_clusters, fan = np.random.default_rng(0), n_labels // 8, 8
    head = stages.model.Head(n_clusters, fan, shape.width, sparse=True).to(device)
    torch.nn.init.normal_(head.weight, std=0.02)
    some = rng.choice(n_clusters, 4096, replace=False)
    clusters_BK = torch.from_numpy(np.stack([rng.choice(some, 256, replace=False) for _ in range(shape.batch)]))
    x_BD = torch.randn(shape.batch, shape.width, device=device, requires_grad=True)
    optimizer = RowAdam([{"params": list(head.parameters())}])
    return partial(label_level_step, head, optimizer, x_BD, clusters_BK.to(device))


def label_level(shape, args, row) -> None:
    """A row for the number of labels, all else being equal. The last one, as it changes how this process allocates:
    big blocks are kept, where giving them back to the system now and then would hit the one or the other."""
    if args.device == "cpu" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)  # M_MMAP_MAX
    few, many = (65536, 131072) if args.toy else (131072, 3145728)
    seconds = in_turn({n: label_level_pass(n, shape, args.device) for n in (few, many)}, 3 * args.rounds)
    row(f"label level, {many:,} labels / {few:,}, same shortlists", seconds[many] / seconds[few], "<= 1.10")


def batch_of(data, batches, rows: np.ndarray, device: str):
    return data.batch("train", rows, int(batches.max_len)).to(device)


def of_all_lengths(batches, n: int) -> list[np.ndarray]:
    """Documents of n batches, from short to long; of one: that of median length."""
    rows_of = sorted(batches.rows(0), key=lambda rows: batches.length_N[rows].max())
    return [rows_of[(2 * i + 1) * len(rows_of) // (2 * n)] for i in range(n)]


def endless(batches):
    """Epoch after epoch."""
    return (batch for epoch in count() for batch in batches(epoch))


def measure(n_labels: int, levels: list[int], topk: list[int], shape, args, row) -> None:
    """Rows for a model of that many labels."""
    data, name = random_data(20000, n_labels), f"{n_labels:,} labels"
    batches = stages.train.Batches(data, shape.batch, shape.tokens, 0)
    (typical,), stream = of_all_lengths(batches, 1), endless(batches)
    fixed = batch_of(data, batches, typical, args.device)
    before = peak_bytes(lambda: None, args.device)
    model = random_model(n_labels, levels, topk, shape.depth, shape.width, shape.tokens, args.device)
    if args.compile:
        model.encoder.compile(dynamic=True)
    optimizers = optimizers_of(model)
    alone = torch.optim.AdamW([p for key, p in model.named_parameters() if key.startswith("encoder.")], fused=True)
    one_step = partial(step, model, optimizers, amp=args.amp)
    seconds = in_turn({
        "resident": often(lambda: one_step(lambda: fixed), args.device),
        "made": often(lambda: one_step(lambda: batch_of(data, batches, typical, args.device)), args.device),
        "encoder": often(partial(encoder_step, model, alone, fixed, args.amp), args.device),
    }, args.rounds)
    row(f"{name}: full step / encoder-only step, same batch", seconds["resident"] / seconds["encoder"],
        "GPU: <= 1.2 at 670K, <= 1.3 at 3M")
    row(f"{name}: step with its batch made from flat ids / batch there already", seconds["made"] / seconds["resident"])
    n = 2 * args.rounds * REPEAT[args.device]
    whole = in_turn({"stream": lambda: [one_step(lambda: next(stream).to(args.device)) for _ in range(n)]}, 1)
    row(f"{name}: documents per second, {n} batches of all lengths", n * shape.batch / whole["stream"], "", ",.0f")
    del alone
    gc.collect()
    top = peak_bytes(lambda: one_step(lambda: fixed), args.device) - (before if args.device == "cpu" else 0)
    held = [*model.parameters(), *(value for o in optimizers for s in o.state.values() for value in s.values())]
    row(f"{name}: peak memory of a step, GiB", top / 2**30, "GPU: <= 8 at 670K, <= 16 at 3M")
    row(f"{name}: of these weights and optimiser states, GiB", sum(x.nbytes for x in held) / 2**30)


def padding(shape, row) -> None:
    batches = stages.train.Batches(random_data(20000, 1000), shape.batch, shape.tokens, 0)
    real = batches.length_N.sum()
    padded = sum(batches.length_N[rows].max() * len(rows) for rows in batches.rows(0))
    row("real / padded tokens, length buckets", real / padded, ">= 0.97", ".3f")
    row("real / padded tokens, padded to the maximum", real / (shape.tokens * len(batches.length_N)), "", ".3f")


def against_usual(n_labels: int, levels: list[int], topk: list[int], shape, args, row) -> None:
    """Rows for the usual way, with documents as they come, padded to the maximum; ours with batches of all lengths."""
    data = random_data(20000, n_labels)
    batches = stages.train.Batches(data, shape.batch, shape.tokens, 0)
    ours, base = (random_model(n_labels, levels, topk, shape.depth, shape.width, shape.tokens, args.device)
                  for _ in range(2))
    optimizers, usual = optimizers_of(ours), Usual(base, n_labels)
    adam = torch.optim.AdamW(usual.parameters(), foreach=False)
    plain = data.batch("train", np.random.default_rng(0).permutation(20000)[: shape.batch], shape.tokens)
    ids, mask = (torch.nn.functional.pad(x, (0, shape.tokens - x.shape[1])) for x in plain[:2])
    plain, rows_of = plain._replace(ids_BT=ids, mask_BT=mask).to(args.device), of_all_lengths(batches, 5)
    one_usual = partial(usual_step, usual, adam, plain, usual.positives(plain), args.amp)
    for spread, name in ((True, "at random"), (False, "alike")):
        spread_shortlists(spread)
        seconds = in_turn({
            "usual": often(one_usual, args.device),
            "ours": lambda: [step(ours, optimizers, partial(batch_of, data, batches, rows, args.device), args.amp)
                             for rows in rows_of],
        }, max(1, args.rounds // 3))
        row(f"{n_labels:,} labels: usual way / ours, shortlists {name}",
            seconds["usual"] / REPEAT[args.device] / (seconds["ours"] / len(rows_of)), ">= 4 on a CPU, >= 5 on a GPU")
    spread_shortlists()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--amp", help="precision of the encoder [off on a CPU, bf16 on a GPU]")
    parser.add_argument("--compile", action="store_true", help="the second size alone, with the encoder compiled")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each kind [15]")
    parser.add_argument("--toy", action="store_true", help="hundreds of labels: only to see that it runs")
    parser.add_argument("--out", default="bench/results/step.json")
    args = parser.parse_args()
    args.amp = args.amp or {"cpu": "off", "cuda": "bf16"}[args.device]
    set_up_torch()
    spread_shortlists()
    shape = argparse.Namespace(**SHAPE[args.device])
    sizes = SIZES["toy" if args.toy else args.device]
    row = Report(args).row
    # From small to big, and the usual way after: what a process has had and freed would hide what the next one takes.
    for n_labels in list(sizes)[1:2] if args.compile else sizes:
        measure(n_labels, *sizes[n_labels], shape, args, row)
    if not args.compile:
        padding(shape, row)
        for n_labels in sizes:
            against_usual(n_labels, *sizes[n_labels], shape, args, row)
        label_level(shape, args, row)


if __name__ == "__main__":
    main()
