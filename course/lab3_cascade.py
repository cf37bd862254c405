# %% [markdown]
"""Lab 3: the cascade.

Goal      You can write the descent through the tree, know when the beam is exact, and choose how
          wide it should be.
Reading   course/lecture.md, sections 6 to 9; functions: match and expand in 02_label_tree.py,
          shortlist, Level, Head, Cascade.nodes, Cascade.descend in 03_model.py (try it yourself
          first: among these are the solutions; Level and Head are given)
Commands  the three commands of lab 2, if lab 2 has not run them
          python -m course.check 3                                            after every step
          python -m course.lab3_cascade                                       at the end
          python 05_eval.py --run runs/course --topk 64,256                   the same by a stage
Minutes   computing: 1, and 1.5 for the commands of lab 2 (two cores); of yours: 80
Target    4 of 4 steps pass; the last cell says that the beam that keeps everything equals scoring
          every label, and its table shows what a narrower beam costs

Fill in every function that raises NotImplementedError. Shape letters: B documents of a batch,
K clusters kept, F children of each, P (document, label) pairs (docs/glossary.md has all).
"""

# %%

import sys
import time
from collections.abc import Iterator

# Start this lab from the folder of the stages, or, as some editors do, from course/.
sys.path.extend([".", ".."])

import numpy as np
import torch
from torch import Tensor

from course import check, runs
from plumbing.stages import load_stages

stages = load_stages()
LAB = 3
RUN = "runs/course"  # the folder that the commands have made
BEAMS = ["4,8", "8,16", "16,32", "32,64", "64,128", "128,512", "256,2048"]  # the last keeps all
N_EXACT = 200  # documents on which the beam that keeps everything is compared
Level = stages.model.Level

# %% Step 1: target matching


def match(node_P: Tensor, doc_P: Tensor, parents_BK: Tensor, fan: int) -> Tensor:
    """Targets (B, K, fan), float: 1 where a candidate is one of its document's correct nodes.

    node_P (P,) are the correct nodes of this level, doc_P (P,) their documents. parents_BK (B, K)
    are the clusters kept one level up; the candidates are their children. Node n is child n % fan
    of parent n // fan. A correct node whose parent was not kept has no place: leave it out.

    With the parents 1 and 0, fan 2 and the correct node 3: the candidates are 2 3 and 0 1, and the
    targets are 0 1 and 0 0. A loop over the P pairs is fine.
    """
    raise NotImplementedError("step 1: where the correct nodes are among the candidates")


# %% Step 2: the shortlist


def shortlist(logits_BKF: Tensor, targets_BKF: Tensor | None, k: int) -> Tensor:
    """Places (B, k) of the clusters kept, among the K * F candidates of each document.

    Without targets (prediction): the k candidates with the largest logits.
    With targets (training): correct ones first, then the others. Among the correct ones, and among
    the others, the larger logit goes first. Section 6 of the lecture has a score that does this.
    The order of the places does not matter. Places count through the K * F candidates.
    """
    raise NotImplementedError("step 2: the places of the k clusters to keep")


# %% Step 3: the descent


def descend(model, features: list[Tensor], batch, teacher: bool) -> Iterator[Level]:
    """Yield a Level for each level, coarse to fine.

    `model` is the Cascade of stage 3, features[t] is (B, D), and there are len(model.heads) levels.
    Of the model you need
        model.heads[t](x_BD, parents_BK)    logits (B, K, F) of the children of these parents
        model.dropout[t](features[t])       x_BD, what level t reads
        model.counts[t + 1] // model.counts[t]      the fan of level t
        model.empty[parents_BK]             (B, K, F) bool; at the last level alone: no label here,
                                            so the logit has to become -inf (masked_fill)
        model.nodes(batch.label_P, t)       (P,) the correct nodes of level t
        model.shortlist(t, logits_BKF, targets_BKF, batch)     your step 2, with k = model.topk[t]
    and stages.tree.match(node_P, batch.doc_P, parents_BK, fan), which is your step 1, and
    stages.tree.expand(parents_BK, fan): the children of all parents, (B, K * F). Of these,
    .gather(1, places) takes the ones at some places.

    Begin at the root: parents_BK (B, 1), int64, is 0 for every document, and picked_BK is None. For
    each level: score, match if there is a teacher (targets are None if not), yield
    Level(parents_BK, picked_BK, logits_BKF, targets_BKF). At all levels but the last, keep the
    best: picked_BK are their places, parents_BK their numbers.
    """
    raise NotImplementedError("step 3: the descent, level by level")


# %% Step 4: what it costs


def nodes_scored(counts: list[int], topk: list[int]) -> list[int]:
    """How many nodes each level scores for a document.

    counts: nodes per level, from the root to the slots, such as [1, 256, 2048, 14336]. topk:
    clusters kept per cluster level, such as [32, 64]. The first level scores all of its nodes.
    These two give [256, 256, 448].
    """
    raise NotImplementedError("step 4: nodes scored, level by level")


# %% [markdown]
"""Questions to talk about

1. In the table, P@5 is nearly the same for all beams, though the narrowest one has lost half of
   the correct labels. Which labels are they? To find out, predict with a narrow beam, and let the
   report count by frequency:
       python 05_eval.py --run runs/course --topk 4,8
       python -m tools.report --run runs/course
2. The recall grows up to 100, but R@100 falls once the beam is wider than in training (32 and 64).
   What has p(label) never seen there? Would another ranking help? Write ranking = "parent", which
   is p(label) p(its cluster), below the `if` of the last cell, and run the lab again.
3. Where is the step from one level to the next one in the code of step 3 differentiable, and where
   is it not? What does the encoder learn from?
"""

# %% With every cluster kept, the beam equals scoring every label


def predict_with(model, topk: list[int]) -> None:
    """Your descent and your shortlist become the model's, which keeps topk clusters from now on."""
    model.topk = topk
    model.shortlist = lambda t, logits, targets, batch: shortlist(logits, targets, model.topk[t])
    model.descend = lambda features, batch, teacher: descend(model, features, batch, teacher)


if __name__ == "__main__":
    check.need_all_steps(LAB, globals())
    runs.need(RUN, "data.npz", "tree.npz", "model.pt")
    data = stages.data.load(RUN)
    model, trained, ranking = stages.train.load(RUN, data)
    model.eval()
    batch = data.batch("test", np.arange(min(N_EXACT, len(data.splits["test"]))), trained.max_len)
    predict_with(model, model.counts[1:-1])  # keep as many clusters as every level has
    with torch.no_grad():
        labels, scores = model.predict(batch, 5, "parent")
        exact_labels, exact_scores = stages.eval.predict_exact(model, batch, 5, "parent")
    # Logarithms of tiny probabilities differ by rounding; the probabilities themselves should not.
    difference = float((scores.exp() - exact_scores.exp()).abs().max())
    print(f"{len(labels)} documents: the largest difference of a probability is {difference:.1e}")
    is_equal = difference < 1e-5
    print(f"the beam that keeps everything {'equals' if is_equal else 'DIFFERS FROM'} every label")

# %% Recall against cost

if __name__ == "__main__":
    split = data.splits["test"]
    n_pairs = len(split.labels)
    has_labels = np.diff(split.label_offsets) > 0

    def find(one_batch, k: int) -> dict[str, np.ndarray]:
        return stages.train.predict_rankings(model, one_batch, k)

    print(f"test, %; {ranking=}")
    print(f"{'kept':>10} {'nodes scored':>13} {'documents/s':>12}  recall    P@1    P@5  R@100")
    for beam in BEAMS:
        # The model is the same for every beam: only the number of clusters that it keeps changes.
        topk = [int(part) for part in beam.split(",")]
        predict_with(model, topk)
        start = time.perf_counter()
        found = stages.train.predict_split(model, data, "test", trained.max_len, 128, find, 100)
        rate = len(split) / (time.perf_counter() - start)
        # Of all correct labels, for how many was the cluster kept at the last cluster level?
        recall = 100 * found[f"kept {len(topk) - 1}"].sum() / n_pairs
        hit_Nk = stages.train.hits(found[f"labels {ranking}"], split)[has_labels]
        P = 100 * stages.eval.precision(hit_Nk)
        n_N = np.diff(split.label_offsets)[has_labels]
        R = 100 * stages.eval.recall(hit_Nk, n_N)
        scored = sum(nodes_scored(model.counts, topk))
        metrics = "".join(f"{percent:7.1f}" for percent in (recall, P[0], P[4], R[99]))
        bar = "#" * round(recall / 2)
        print(f"{beam:>10} {scored:13,} {rate:12,.0f} {metrics}  {bar}")
