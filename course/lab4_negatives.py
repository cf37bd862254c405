# %% [markdown]
"""Lab 4: negatives and losses.

Goal      You know what the cascade learns from: which nodes are in the loss, and which layer of the
          encoder each level reads. You have seen what each choice is worth.
Reading   course/lecture.md, sections 6 and 7; functions in 03_model.py: Cascade.level_loss,
          shortlist, choose_layers; docs/forking.md, "Other negatives" (try it yourself first: these
          are the solutions)
Commands  python 01_data.py --run runs/course --limit 12000 --vocab 8000      if lab 2 has not run
          python 02_label_tree.py --run runs/course                           these three
          python 04_train.py --run runs/course --max-len 32 --epochs 3 --topk 32,64
          python -m course.check 4                                            after every step
          python -m course.lab4_negatives                                     at the end
Minutes   computing: 7, and 1.5 for the commands of lab 2 (two cores); of yours: 60
Target    3 of 3 steps pass, and you can explain both tables of the last cells

Fill in every function that raises NotImplementedError. Shape letters: B documents of a batch,
K clusters kept one level up, F children of each (docs/glossary.md has all).
"""

# %%

import sys

# Start this lab from the folder of the stages, or, as some editors do, from course/.
sys.path.extend([".", ".."])

import torch
from torch import Tensor

from course import check, runs
from plumbing.stages import load_stages

stages = load_stages()
LAB = 4
RUN = "runs/course"  # the folder that the commands have made
TOPK = "32,64"  # clusters that a level keeps
MAX_LEN = 32
EPOCHS = 3
DEEP = "4,128"  # layers and width of the encoder whose layers are compared

# %% Step 1: the loss of a level


def level_loss(logits_BKF: Tensor, targets_BKF: Tensor) -> Tensor:
    """The binary cross-entropy: summed over a document's candidates, averaged over the documents.

    For a logit z and a target y it is softplus(z) - y z. An empty slot has z = -inf and y = 0, and
    its loss is 0: mind that 0 times -inf is no number. softplus is torch.nn.functional.softplus.
    """
    raise NotImplementedError("step 1: one number, the loss of a level")


# %% Step 2: random negatives


def random_shortlist(noise_BKF: Tensor, targets_BKF: Tensor, k: int) -> Tensor:
    """Places (B, k) of the clusters that training keeps: correct ones, then random ones.

    noise_BKF are random numbers from a normal distribution, one for each candidate. Correct
    candidates go first, whatever their noise. The places left go to those with the largest noise.
    If there are more than k correct ones, the noise decides among them. The order of the places
    does not matter; they count through the K * F candidates.
    """
    raise NotImplementedError("step 2: the places of correct and of random clusters")


# %% Step 3: a layer for each level


def choose_layers(depth: int, n_levels: int) -> list[list[int]]:
    """The hidden states that each level reads, coarse to fine; `depth` is the number of the last.

    A level that is j levels above the labels reads the layer depth * (1 - j / 6), rounded half up:
    int(x + 0.5). The lowest possible layer is 1. The coarsest level reads the layer before as well,
    if that is at least 1 and there is more than one level. So 12 layers and three levels give
    [[7, 8], [10], [12]].
    """
    raise NotImplementedError("step 3: a list of layers for each level")


# %% [markdown]
"""Questions to talk about

1. Random negatives teach a level which labels belong to a document of *another* subject. Why is
   that not enough?
2. Without a teacher the correct label is often not scored. What does the last level learn then?
3. Which of your differences would you believe after one seed? How would you find out
   (docs/forking.md, last section)?
"""

# %% Three ways to choose the negatives


class RandomNegatives(stages.model.Cascade):
    """Correct clusters first, and random ones after them."""

    def shortlist(self, t, logits_BKF, targets_BKF, batch):
        # In prediction nothing is random: the best clusters are kept.
        if targets_BKF is None:
            return stages.model.shortlist(logits_BKF, None, self.topk[t])
        return random_shortlist(torch.randn_like(logits_BKF), targets_BKF, self.topk[t])


class NoTeacher(stages.model.Cascade):
    """What looks best, in training as in prediction."""

    def shortlist(self, t, logits_BKF, targets_BKF, batch):
        return stages.model.shortlist(logits_BKF, None, self.topk[t])


def train(name: str, cascade: type, **settings) -> runs.Reached:
    """Train in a folder of its own, with your level_loss; what it reaches on validation."""
    # A class of its own: your loss takes the place of the method of stage 3.
    mine = type(cascade.__name__, (cascade,), {"level_loss": staticmethod(level_loss)})

    def build(data, tree, config, encoder=None):
        return stages.model.build(data, tree, config, encoder, mine)

    run = runs.new_run(RUN, name)
    common = {"run": run, "max_len": MAX_LEN, "epochs": EPOCHS, "topk": TOPK}
    stages.train.run(stages.train.Config(**common, **settings), build)
    return runs.reached(run)


def print_table(rows: dict[str, runs.Reached]) -> None:
    print(f"{'validation, %':28}  best ranking   p(label) alone   recall of the shortlist")
    print(f"{'':28}    P@1    P@5      P@1    P@5     level by level")
    for name, best in rows.items():
        chosen = f"{best.precision[0]:7.1f}{best.precision[2]:7.1f}"
        alone = f"{best.by_label[0]:7.1f}{best.by_label[2]:7.1f}"
        recall = "".join(f"{percent:7.1f}" for percent in best.recall)
        print(f"{name:28}{chosen}  {alone}  {recall}")


if __name__ == "__main__":
    check.need_all_steps(LAB, globals())
    runs.need(RUN, "data.npz", "tree.npz")
    print_table(
        {
            "hard negatives": train("hard", stages.model.Cascade),
            "random negatives": train("random", RandomNegatives),
            "hard negatives, no teacher": train("no-teacher", NoTeacher),
        }
    )

# %% One layer for all levels, or a layer for each


def as_words(layers: list[list[int]]) -> str:
    """[[2, 3], [3], [4]] as the flag --layers has it: 2+3,3,4."""
    return ",".join("+".join(str(layer) for layer in group) for group in layers)


if __name__ == "__main__":
    # The demo's encoder has a single layer, which leaves no choice: here a deeper one is trained.
    depth = int(DEEP.split(",")[0])
    n_levels = len(stages.tree.load(RUN).levels) + 1
    own = as_words(choose_layers(depth, n_levels))
    same = as_words([[depth]] * n_levels)
    print_table(
        {
            f"a layer for each: {own}": train(
                "layers", stages.model.Cascade, tiny=DEEP, layers=own
            ),
            f"one layer for all: {same}": train(
                "one-layer", stages.model.Cascade, tiny=DEEP, layers=same
            ),
        }
    )
