# %% [markdown]
"""Lab 0: a toy tree, by hand.

Goal      You can say, for a small tree, what every level of the cascade keeps and scores, in
          training and in prediction, and why a correct label can be lost.
Reading   course/lecture.md, sections 5 and 6; the docstrings at the top of 02_label_tree.py and of
          03_model.py; functions: expand in 02_label_tree.py, Cascade.nodes in 03_model.py (try it
          yourself first: these are the solutions of steps 1 and 2)
Commands  python -m course.check 0      after every step
          python -m course.lab0_toy     at the end: the real cascade does the same
Minutes   computing: none to speak of (the check takes seconds); of yours: 30
Target    4 of 4 steps pass; the last cell prints what you have traced

The tree has eight labels and three levels. Below every node stands its logit.

    level 1                  0                               1
    logit                   0.5                            -0.3
    level 2          0               1               2               3
    logit           1.0            -1.0             0.2            -0.7
    slot         0       1       2       3       4       5       6       7
    label        6       2       5       0       7       1       4       3
    logit       0.3    -1.2     0.8    -0.6     1.1    -0.4     2.0    -0.2

Level 1 keeps two clusters, which here are all, and level 2 keeps two as well. The document has one
correct label, label 4.

Fill in every function that raises NotImplementedError. In the first two you write code. In the last
two you write the answer itself, as lists of numbers (a single number, too: [3]): trace the descent
with a pencil. Of these the check says which lists are right, and shows the first wrong one.

Shape letters: P slots, B documents, K clusters of each (docs/glossary.md has all).
"""

# %%

import sys

# Start this lab from the folder of the stages, or, as some editors do, from course/.
sys.path.extend([".", ".."])

import numpy as np

from course import check
from course.toy import CORRECT, toy_cascade, trace

LAB = 0

# %% Step 1: from a slot to the node above it


def node_of(slot_P: np.ndarray, n_nodes: int, n_slots: int) -> np.ndarray:
    """(P,) int: the node above each slot, on a level that has n_nodes nodes.

    The slots of a node stand side by side, and every node has equally many of them. In the tree
    above, slot 5 is below node 2 of level 2 (n_nodes = 4), and below node 1 of level 1.

    Formula: node = floor(slot / (slots of one node)). One line is enough.
    """
    raise NotImplementedError("step 1: the node above each slot")


# %% Step 2: from clusters to their children


def children(parents_BK: np.ndarray, fan: int) -> np.ndarray:
    """(B, K * fan) int: the children of each document's K clusters, parent by parent.

    Node c has the children c * fan, ..., c * fan + fan - 1. With fan 2, nodes 1 and 3 have the
    children 2 3 6 7, in this order. A first step may be an array (B, K, fan).
    """
    raise NotImplementedError("step 2: the children of each cluster")


# %% Step 3: prediction, by hand


def trace_of_prediction() -> dict[str, list[int]]:
    """What the descent does when nobody knows the answer.

    Return a dictionary, with a list of numbers under each of these keys:
    "kept by level 1"      nodes of level 1
    "scored at level 2"    nodes of level 2: the children of the ones that were kept
    "kept by level 2"      nodes of level 2: the two with the largest logits of the ones scored
    "labels scored"        labels (not slots!) below the nodes that level 2 keeps
    "best label"           a list of one label: the one scored that has the largest logit
    """
    raise NotImplementedError("step 3: your trace of prediction")


# %% Step 4: training, by hand


def trace_of_training() -> dict[str, list[int]]:
    """What the descent does in training, where clusters with a correct label go first.

    Return a dictionary, with a list of numbers under each of these keys:
    "kept by level 1", "scored at level 2", "kept by level 2", "labels scored"    as in step 3
    "hard negatives"       labels that are scored and are not correct

    At level 2, one place goes to the cluster of the correct label. Which cluster gets the other?
    """
    raise NotImplementedError("step 4: your trace of training")


# %% [markdown]
"""Questions to talk about

1. Label 4 has the largest logit of all. Why is it not predicted? What would have to change?
2. Which labels get no gradient at all from this document?
3. Let level 2 keep three clusters. Which labels are scored now, in training and in prediction?
"""

# %% The same descent, by the real Cascade

if __name__ == "__main__":
    check.need_all_steps(LAB, globals())
    for teacher in (False, True):
        print("training" if teacher else "prediction")
        for name, nodes in trace(toy_cascade(), [CORRECT], teacher).items():
            print(f"    {name:20} {nodes}")
