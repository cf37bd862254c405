"""The steps of lab 0. Oracles: Cascade.nodes, expand and Cascade.descend."""

from types import SimpleNamespace

import numpy as np
import torch

from course.steps import Case, Mistake, Step
from course.toy import (
    CLUSTER_LOGITS,
    CORRECT,
    KEPT,
    LEVELS,
    SLOT_LOGITS,
    SLOT_TO_LABEL,
    cascade,
    stages,
    toy_cascade,
    trace,
)

# Step 1


def node_of(slot_P: np.ndarray, n_nodes: int, n_slots: int) -> np.ndarray:
    """Cascade.nodes, of labels that stand in the slots of their own numbers."""
    # All that the method asks of a cascade: where a label stands, and how many nodes there are.
    tree = SimpleNamespace(label_to_slot=torch.arange(n_slots), counts=[1, n_nodes, n_slots])
    node_P = stages.model.Cascade.nodes(tree, torch.as_tensor(slot_P), 0)
    return node_P.numpy()


NODE_OF = Step(
    name="node_of",
    oracle=node_of,
    cases=[
        Case("slots 0 to 7, 4 nodes of 8 slots", (np.arange(8), 4, 8)),
        Case("slots 0 to 31, 4 nodes of 32 slots", (np.arange(32), 4, 32)),
    ],
    mistakes=[
        Mistake(
            lambda slot_P, n_nodes, n_slots: slot_P // n_nodes,
            "you divide by the number of nodes; divide by the number of slots of one node",
        ),
        Mistake(
            lambda slot_P, n_nodes, n_slots: slot_P % n_nodes,
            "the remainder deals the slots out like cards; those of a node stand side by side",
        ),
        Mistake(
            lambda slot_P, n_nodes, n_slots: slot_P / (n_slots // n_nodes),
            "a node is a whole number: // instead of /",
        ),
    ],
    hint="how many slots has one node? which of these blocks is the slot in?",
)

# Step 2


def children(parents_BK: np.ndarray, fan: int) -> np.ndarray:
    return stages.tree.expand(torch.as_tensor(parents_BK), fan).numpy()


def child_by_child(parents_BK: np.ndarray, fan: int) -> np.ndarray:
    """All first children, then all second ones."""
    return np.concatenate([parents_BK * fan + child for child in range(fan)], axis=1)


CHILDREN = Step(
    name="children",
    oracle=children,
    cases=[
        Case("parents 1 and 3, fan 2", (np.array([[1, 3]]), 2)),
        Case("two documents, fan 3", (np.array([[4, 0], [2, 5]]), 3)),
    ],
    mistakes=[
        Mistake(
            child_by_child, "right nodes, wrong order: all children of the first parent come first"
        ),
        Mistake(
            lambda parents_BK, fan: (parents_BK[..., None] + np.arange(fan)).reshape(
                len(parents_BK), -1
            ),
            "the children of node c begin at c * fan, not at c",
        ),
        Mistake(
            lambda parents_BK, fan: (parents_BK[..., None] * fan + np.arange(1, fan + 1)).reshape(
                len(parents_BK), -1
            ),
            "children are counted from 0: the first one is c * fan",
        ),
    ],
    hint="parents_BK[..., None] * fan + np.arange(fan) is (B, K, fan); put its last two "
    "dimensions into one",
)

# Steps 3 and 4. A result has a list under each key; the order in a list does not matter.


def in_order(keys: list[str]):
    """What compares two traces: their lists, sorted, in the order of the keys."""

    def view(found: dict[str, list[int]]) -> list[np.ndarray]:
        missing = [key for key in keys if key not in found]
        if missing:
            raise KeyError(f"the key {missing[0]!r} is missing")
        return [np.sort(np.asarray(found[key], np.int64)) for key in keys]

    return view


def predicted() -> dict[str, list[int]]:
    return trace(toy_cascade(), [CORRECT], teacher=False)


def trained() -> dict[str, list[int]]:
    return trace(toy_cascade(), [CORRECT], teacher=True)


def with_slots_for_labels(teacher: bool) -> dict[str, list[int]]:
    """The trace of somebody who forgets that label and slot differ, but knows the correct slot."""
    slots = list(range(8))
    logits = [*CLUSTER_LOGITS, SLOT_LOGITS]
    model = cascade(slots, logits, KEPT, LEVELS)
    return trace(model, [SLOT_TO_LABEL.index(CORRECT)], teacher)


def predicted_with_the_teacher() -> dict[str, list[int]]:
    """The correct cluster first, though nobody knows it."""
    found = trained()
    found["best label"] = [CORRECT]
    return found


def predicted_from_everything() -> dict[str, list[int]]:
    """The largest logit of all eight labels."""
    return predicted() | {"best label": [CORRECT]}


def trained_without_the_teacher() -> dict[str, list[int]]:
    found = predicted()
    return found | {"hard negatives": sorted(set(found["labels scored"]) - {CORRECT})}


def trained_with_a_correct_negative() -> dict[str, list[int]]:
    found = trained()
    return found | {"hard negatives": found["labels scored"]}


# Hints for the parts that both traces have, and for those that differ.
OF_BOTH = {
    "kept by level 1": "level 1 keeps two clusters; how many does it have?",
    "scored at level 2": "the children of all clusters that level 1 keeps; c has 2c and 2c + 1",
}
LABELS_SCORED = {
    "labels scored": "a cluster c of level 2 has the slots 2c and 2c + 1: which labels are in them?"
}
OF_PREDICTION = {
    **OF_BOTH,
    "kept by level 2": "of the nodes scored, the two with the largest logits",
    **LABELS_SCORED,
    "best label": "of the labels scored, the one with the largest logit",
}
OF_TRAINING = {
    **OF_BOTH,
    "kept by level 2": "which node is above label 4? it goes first, whatever its logit; the other "
    "place goes to the wrong node with the largest logit",
    **LABELS_SCORED,
    "hard negatives": "the labels scored, without the correct one",
}


def slots_for_labels(teacher: bool) -> Mistake:
    """The same mistake in both traces."""
    return Mistake(
        lambda: with_slots_for_labels(teacher),
        "these are slots: look up in the row below which label stands in each",
    )


PREDICTION = Step(
    name="trace_of_prediction",
    oracle=predicted,
    cases=[Case("the five lists, each sorted", ())],
    mistakes=[
        Mistake(
            predicted_with_the_teacher,
            "nobody knows the correct label in prediction: level 2 keeps the two best logits",
        ),
        Mistake(
            predicted_from_everything,
            "label 4 has the largest logit of all, but is it among the labels scored?",
        ),
        slots_for_labels(teacher=False),
    ],
    hint="a dictionary with a list of numbers under each of the five keys",
    view=in_order(list(OF_PREDICTION)),
    parts=OF_PREDICTION,
)
TRAINING = Step(
    name="trace_of_training",
    oracle=trained,
    cases=[Case("the five lists, each sorted", ())],
    mistakes=[
        Mistake(
            trained_without_the_teacher,
            "in training the cluster above label 4 goes first, whatever its logit",
        ),
        Mistake(
            trained_with_a_correct_negative,
            "label 4 is scored and correct: it is no negative",
        ),
        slots_for_labels(teacher=True),
    ],
    hint="a dictionary with a list of numbers under each of the five keys",
    view=in_order(list(OF_TRAINING)),
    parts=OF_TRAINING,
)

STEPS = [NODE_OF, CHILDREN, PREDICTION, TRAINING]
