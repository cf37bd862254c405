"""The toy of lab 0 and of the lecture: eight labels, three levels, logits that are given.

A cascade whose weights are zero says the same of every document: its biases. So we choose the
logits of all nodes, and watch the real Cascade go down the tree with them.
"""

import torch
from torch import Tensor, nn

from plumbing.stages import load_stages

stages = load_stages()

LEVELS = [2, 4]
SLOT_TO_LABEL = [6, 2, 5, 0, 7, 1, 4, 3]
CLUSTER_LOGITS = [[0.5, -0.3], [1.0, -1.0, 0.2, -0.7]]
SLOT_LOGITS = [0.3, -1.2, 0.8, -0.6, 1.1, -0.4, 2.0, -0.2]
KEPT = [2, 2]  # clusters that level 1 and level 2 keep
CORRECT = 4  # the document's only label


class NoEncoder(nn.Module):
    """An encoder whose only feature is 0 for every document."""

    width = 1
    depth = 0
    table = None

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, layers: set[int]) -> dict[int, Tensor]:
        feature_BD = torch.zeros(len(ids_BT), 1)
        return dict.fromkeys(layers, feature_BD)


def cascade(
    slot_to_label: list[int], logits: list[list[float]], kept: list[int], levels: list[int]
) -> nn.Module:
    """A cascade whose nodes have these logits for every document, in evaluation mode."""
    # Every level reads the only hidden state there is. It is 0, so a logit is its bias.
    tree = stages.tree.Tree(torch.tensor(slot_to_label, dtype=torch.int32).numpy(), levels)
    layers = [[0]] * (len(levels) + 1)
    model = stages.model.Cascade(NoEncoder(), tree, kept, layers, join="none")
    for head, values in zip(model.heads, logits, strict=True):
        bias_CF = torch.tensor(values).view_as(head.bias)
        head.bias.data.copy_(bias_CF)
    return model.eval()


def toy_cascade() -> nn.Module:
    """The cascade of lab 0."""
    return cascade(SLOT_TO_LABEL, [*CLUSTER_LOGITS, SLOT_LOGITS], KEPT, LEVELS)


def one_document(labels: list[int]) -> tuple:
    """A batch of one document with these labels."""
    one = torch.ones(1, 1, dtype=torch.int64)
    doc_P = torch.zeros(len(labels), dtype=torch.int64)
    return stages.data.Batch(one, one, doc_P, torch.tensor(labels, dtype=torch.int64))


def trace(model: nn.Module, labels: list[int], teacher: bool) -> dict[str, list[int]]:
    """What the descent of one document keeps and scores, level by level."""
    batch = one_document(labels)
    levels = list(model.descend(model.features(batch), batch, teacher))
    found = {}
    # What level t keeps are the parents of the level after it.
    for t, level in enumerate(levels[1:], 1):
        fan = level.logits_BKF.shape[2]
        scored = stages.tree.expand(level.parents_BK, fan)[0].tolist()
        found[f"kept by level {t}"] = sorted(level.parents_BK[0].tolist())
        if t + 1 < len(levels):
            found[f"scored at level {t + 1}"] = sorted(scored)
    # The candidates of the last level are slots, and a document has labels.
    scored_labels = model.slot_to_label[torch.tensor(scored)].tolist()
    found["labels scored"] = sorted(scored_labels)
    if teacher:
        found["hard negatives"] = sorted(set(scored_labels) - set(labels))
    else:
        # By p(label) alone, as on paper: the largest logit of the labels that were reached.
        best, _ = model.predict(batch, 1, "label")
        found["best label"] = best[0].tolist()
    return found
