"""The steps of lab 3. Oracles: match of stage 2, shortlist and Cascade.descend of stage 3.

Shapes   B documents, K clusters kept, F children of each, P (document, label) pairs, D width
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from course.steps import Case, Mistake, Sign, Step
from course.toy import NoEncoder, stages

tree_stage = stages.tree
model_stage = stages.model
numbers = torch.Generator().manual_seed(0)

# Step 1. Three documents, the clusters kept of 6, and pairs whose parent may be missing.
PARENTS = torch.tensor([[1, 0], [5, 2], [3, 4]])
PAIRS = (torch.tensor([3, 9, 11, 17, 1, 12]), torch.tensor([0, 0, 1, 1, 2, 2]), PARENTS, 3)


def without_parents(node_P: Tensor, doc_P: Tensor, parents_BK: Tensor, fan: int) -> Tensor:
    """Someone who takes the clusters of the shortlist for the first K clusters of the level."""
    n_documents, n_parents = parents_BK.shape
    first = torch.arange(n_parents).expand(n_documents, n_parents)
    return tree_stage.match(node_P, doc_P, first, fan)


def of_any_document(node_P: Tensor, doc_P: Tensor, parents_BK: Tensor, fan: int) -> Tensor:
    """Someone who forgets whose node it is."""
    targets_BKF = torch.zeros(*parents_BK.shape, fan)
    for document in range(len(parents_BK)):
        all_of_them = torch.full_like(doc_P, document)
        targets_BKF += tree_stage.match(node_P, all_of_them, parents_BK, fan)
    return targets_BKF.clamp(max=1)


def lost_ones_in_place_0(node_P: Tensor, doc_P: Tensor, parents_BK: Tensor, fan: int) -> Tensor:
    """argmax of no match is 0: the first parent gets nodes that are not its own."""
    targets_BKF = tree_stage.match(node_P, doc_P, parents_BK, fan)
    is_lost_P = (parents_BK[doc_P] != (node_P // fan)[:, None]).all(dim=1)
    targets_BKF[doc_P[is_lost_P], 0, node_P[is_lost_P] % fan] = 1
    return targets_BKF


MATCH = Step(
    name="match",
    oracle=tree_stage.match,
    cases=[
        Case(
            "parents 1 and 0, fan 2, correct node 3",
            (torch.tensor([3]), torch.tensor([0]), torch.tensor([[1, 0]]), 2),
        ),
        Case("three documents, fan 3, two correct nodes each", PAIRS),
    ],
    mistakes=[
        Mistake(
            without_parents,
            "the place of a parent on its document's shortlist is not its number: look it up in "
            "parents_BK",
        ),
        Mistake(of_any_document, "doc_P says whose correct node it is: only that document's row"),
        Mistake(
            lost_ones_in_place_0,
            "a correct node whose parent was not kept must be left out; argmax says 0 for it",
        ),
    ],
    hint="for a pair (n, d): is n // fan in parents_BK[d]? at which place? then child n % fan is 1",
)

# Step 2
# Some logits of correct candidates are so low that logit + 1 would still lose.
LOGITS = torch.randn(4, 3, 4, generator=numbers)
TARGETS = (torch.rand(4, 3, 4, generator=numbers) < 0.2).float()


def by_place(found: Tensor) -> np.ndarray:
    """The order of the places does not matter."""
    return np.sort(torch.as_tensor(found).numpy(), axis=1)


def without_teacher(logits_BKF: Tensor, targets_BKF: Tensor | None, k: int) -> Tensor:
    return model_stage.shortlist(logits_BKF, None, k)


def with_raw_logits(logits_BKF: Tensor, targets_BKF: Tensor | None, k: int) -> Tensor:
    """logit + target: a correct cluster with a low logit still loses."""
    if targets_BKF is None:
        return model_stage.shortlist(logits_BKF, None, k)
    return model_stage.shortlist(logits_BKF + targets_BKF, None, k)


def the_worst(logits_BKF: Tensor, targets_BKF: Tensor | None, k: int) -> Tensor:
    return model_stage.shortlist(-logits_BKF, targets_BKF, k)


def are_scores(result: Tensor, *arguments) -> bool:
    return torch.as_tensor(result).is_floating_point()


def has_the_correct_ones_alone(
    result: Tensor, logits_BKF: Tensor, targets_BKF: Tensor | None, k: int
) -> bool:
    """Every correct candidate is kept, and the other places went to others than the best ones.

    Without targets this fails, and a sign that fails does not show.
    """
    is_kept_BM = torch.zeros_like(targets_BKF.flatten(1)).scatter(1, torch.as_tensor(result), 1)
    return bool((is_kept_BM >= targets_BKF.flatten(1)).all())


def per_parent(result: Tensor, logits_BKF: Tensor, targets_BKF: Tensor | None, k: int) -> bool:
    """Numbers that never reach beyond the children of a single parent."""
    return bool((torch.as_tensor(result) < logits_BKF.shape[2]).all())


SHORTLIST = Step(
    name="shortlist",
    oracle=model_stage.shortlist,
    cases=[
        Case("prediction: 4 documents, 3 x 4 candidates, keep 5", (LOGITS, None, 5)),
        Case("training: the same with targets", (LOGITS, TARGETS, 5)),
    ],
    mistakes=[
        Mistake(without_teacher, "in training, candidates with a target go first"),
        Mistake(
            with_raw_logits,
            "a logit may be -5, and 1 more does not put it first; a probability (sigmoid) is at "
            "most 1, so 1 more does",
        ),
        Mistake(the_worst, "these are the smallest logits: topk takes the largest"),
    ],
    signs=[
        Sign(are_scores, "these are scores; the places are topk(...).indices"),
        Sign(
            per_parent,
            "places count through all K * F candidates of a document: flatten(1) before topk",
        ),
        Sign(
            has_the_correct_ones_alone,
            "the correct ones are kept; the places left are for the most probable wrong ones: rank "
            "by probability + target, not by the target alone",
        ),
    ],
    hint="flatten the K x F candidates of a document, and take .topk(k, dim=1).indices",
    view=by_place,
)


# Step 3. Small cascades with random weights; the label tree has an empty slot.
class NeverAsked(NoEncoder):
    """An encoder that is never asked: the batch brings its features."""

    width = 4


class Doubled(nn.Module):
    def forward(self, x_BD: Tensor) -> Tensor:
        return 2 * x_BD


def small_cascade(topk: list[int]) -> nn.Module:
    """A cascade of 3, 6 and 12 nodes.

    A dropout of a model that predicts changes nothing, so whoever forgets it would not be noticed.
    Here it doubles what it is given.
    """
    slots = np.array([6, 2, 5, 0, 7, -1, 1, 4, 3, 8, 10, 9], np.int32)
    tree = tree_stage.Tree(slots, [3, 6])
    layers = [[0], [0], [0]]  # a single layer for each level: there is nothing to join
    model = model_stage.Cascade(NeverAsked(), tree, topk, layers, join="none")
    for parameter in model.heads.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=numbers))
    model.dropout = nn.ModuleList([Doubled(), Doubled(), Doubled()])
    return model.eval()


def small_batch() -> tuple:
    """Three documents with features, and two labels each."""
    # In the place of token ids and mask, which nobody reads.
    one = torch.ones(3, 1, dtype=torch.int64)
    doc_P = torch.tensor([0, 0, 1, 1, 2, 2])
    label_P = torch.tensor([6, 4, 3, 9, 0, 7])
    pooled_BHD = torch.randn(3, 1, 4, generator=numbers)
    return stages.data.Batch(one, one, doc_P, label_P, pooled_BHD)


def descent(topk: list[int], teacher: bool) -> tuple:
    """The arguments of one descent."""
    model = small_cascade(topk)
    batch = small_batch()
    # Each level reads something else: a level that reads another one's feature is noticed.
    features = [(t + 1) * x_BD for t, x_BD in enumerate(model.features(batch))]
    return model, features, batch, teacher


def sorted_levels(levels: list) -> list[Tensor]:
    """What counts of the levels: for each, parents, logits and targets, sorted by parent.

    In which order a shortlist stands does not matter. Where picked_BK leads to, the parents should
    be, so we look up the clusters at these places.
    """
    found = []
    before = None
    for level in levels:
        parents_BK = torch.as_tensor(level.parents_BK)
        logits_BKF = torch.as_tensor(level.logits_BKF)
        order_BK = parents_BK.argsort(dim=1)
        order_BKF = order_BK[..., None].expand(-1, -1, logits_BKF.shape[2])
        found.append(parents_BK.gather(1, order_BK))
        found.append(logits_BKF.gather(1, order_BKF))
        if level.targets_BKF is not None:
            found.append(level.targets_BKF.gather(1, order_BKF))
        # Places depend on the order of the parents one level up. The clusters there do not.
        if before is not None:
            candidates_BM = tree_stage.expand(before.parents_BK, before.logits_BKF.shape[2])
            picked = candidates_BM.gather(1, level.picked_BK)
            found.append(picked.gather(1, order_BK))
        before = level
    return found


def changed(**parts: Callable) -> Callable:
    """The stage's descent of a model some of whose parts are others."""

    def wrong(model, features, batch, teacher):
        # The model may be changed: a check calls every function with copies of the arguments.
        for name, part in parts.items():
            setattr(model, name, part(model))
        return model_stage.Cascade.descend(model, features, batch, teacher)

    return wrong


def first_parents(model: nn.Module) -> Callable:
    """The next level goes on with the first clusters, whatever was kept."""

    def keep(t: int, logits_BKF: Tensor, targets_BKF: Tensor | None, batch: tuple) -> Tensor:
        return torch.arange(model.topk[t]).expand(len(logits_BKF), model.topk[t])

    return keep


def without_dropout(model: nn.Module) -> nn.ModuleList:
    return nn.ModuleList([nn.Identity() for _ in model.dropout])


def with_the_last_feature(model, features, batch, teacher):
    """Every level reads what the labels read."""
    return model_stage.Cascade.descend(model, features[-1:] * len(features), batch, teacher)


def with_the_first_feature(model, features, batch, teacher):
    return model_stage.Cascade.descend(model, features[:1] * len(features), batch, teacher)


def never_empty(model: nn.Module) -> Tensor:
    return torch.zeros_like(model.empty)


def without_a_teacher(model, features, batch, teacher):
    return model_stage.Cascade.descend(model, features, batch, False)


def always_a_teacher(model, features, batch, teacher):
    return model_stage.Cascade.descend(model, features, batch, True)


def has_places_for_parents(levels: list, *arguments) -> bool:
    """picked_BK taken for the numbers of the clusters."""
    last = levels[-1]
    return torch.equal(last.parents_BK, last.picked_BK)


EACH_ITS_OWN = "each level reads a feature of its own: level t reads features[t]"
DESCEND = Step(
    name="descend",
    oracle=model_stage.Cascade.descend,
    cases=[
        Case("prediction; levels of 3, 6 and 12 nodes; 1 and 2 are kept", descent([1, 2], False)),
        Case("training; the same tree; 2 and 3 are kept", descent([2, 3], True)),
        Case("prediction; 2 and 3 are kept", descent([2, 3], False)),
        Case("prediction; every cluster is kept", descent([3, 6], False)),
    ],
    mistakes=[
        Mistake(
            always_a_teacher,
            "there is a teacher in prediction: targets are None unless `teacher` is true",
        ),
        Mistake(without_a_teacher, "with a teacher, match the correct nodes: targets_BKF is None"),
        Mistake(
            changed(empty=never_empty),
            "an empty slot has the logit -inf: masked_fill at the last level",
        ),
        Mistake(
            changed(dropout=without_dropout), "what level t reads is model.dropout[t](features[t])"
        ),
        Mistake(with_the_last_feature, EACH_ITS_OWN),
        Mistake(with_the_first_feature, EACH_ITS_OWN),
        Mistake(changed(shortlist=first_parents), "ask model.shortlist which clusters are kept"),
    ],
    signs=[
        Sign(
            has_places_for_parents,
            "picked_BK are places among the candidates; the clusters are "
            "stages.tree.expand(parents_BK, fan).gather(1, picked_BK)",
        ),
    ],
    hint="for each level: logits, targets, yield, and then the clusters kept become the parents",
    view=sorted_levels,
    tolerance=1e-5,
)

# Step 4


def nodes_scored(counts: list[int], topk: list[int]) -> list[int]:
    """Counted in a real descent: the candidates of each level."""
    layers = [[0]] * (len(counts) - 1)
    slots = np.arange(counts[-1], dtype=np.int32)
    tree = tree_stage.Tree(slots, counts[1:-1])
    model = model_stage.Cascade(NoEncoder(), tree, topk, layers, join="none").eval()
    # One document of one token, without labels: how many nodes are scored is a matter of shapes.
    one = torch.ones(1, 1, dtype=torch.int64)
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = stages.data.Batch(one, one, nothing, nothing)
    levels = model.descend(model.features(batch), batch, teacher=False)
    return [level.logits_BKF[0].numel() for level in levels]


def fans(counts: list[int]) -> np.ndarray:
    return np.array(counts[1:]) // np.array(counts[:-1])


NODES_SCORED = Step(
    name="nodes_scored",
    oracle=nodes_scored,
    cases=[
        Case("counts 1 4 8 32, kept 2 and 3", ([1, 4, 8, 32], [2, 3])),
        Case("counts 1 256 2048 14336, kept 32 and 64", ([1, 256, 2048, 14336], [32, 64])),
    ],
    mistakes=[
        Mistake(lambda counts, topk: counts[1:], "these are all nodes of each level"),
        Mistake(
            lambda counts, topk: [counts[1], *topk],
            "these are the clusters kept; each of them has a fan of children, which are scored",
        ),
        Mistake(
            lambda counts, topk: [k * fan for k, fan in zip(topk, fans(counts)[1:], strict=True)],
            "the first level is missing: it scores all of its nodes",
        ),
        Mistake(
            lambda counts, topk: [
                k * fan for k, fan in zip([1, *topk], [*fans(counts)[1:], 1], strict=True)
            ],
            "the fan of a level is its own number of nodes over that of the level above",
        ),
        Mistake(
            lambda counts, topk: (np.cumprod([1, *topk]) * fans(counts)).tolist(),
            "topk is what is kept in all, not for each cluster of the level above",
        ),
    ],
    hint="level t scores topk[t - 1] * (counts[t + 1] // counts[t]) nodes; level 0 has one parent",
)

STEPS = [MATCH, SHORTLIST, DESCEND, NODES_SCORED]
