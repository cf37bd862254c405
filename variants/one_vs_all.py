"""Exhaustive one-vs-all: the same encoder, every label scored. What the shortlist saves, and what
it costs.

    python -m variants.one_vs_all --run runs/demo

Reads    RUN/data.npz, RUN/tree.npz, RUN/model.pt (its settings)
Writes   RUN/one_vs_all/    a run folder: tree.npz, model.pt, predictions.npz, ...

One-vs-all gives every label a yes-or-no question of its own, and asks all of them. Here it is the
cascade on a tree that is nothing but its root: the children of the root are all the labels, so the
shortlist is everything, there are no negatives to choose, and p(label) is trained on all documents.
What differs:

- There are no cluster levels, hence one head, which reads the last layer, and one term in the loss.
- A step costs B * L * D, and its memory holds logits (B, L): fine for ten thousand labels, not for
  millions.
- Scores need no parent: the ranking is p(label).

The rows of the labels are trained by RowAdam, as the cascade's are, with the dropout that the
cascade's label level has with two cluster levels, 0.4.

Shapes   B documents of a batch, L labels, D width
"""

from plumbing.cli import main
from variants import common
from variants.common import Config, none, stages, train_on_tree

NAME = "one_vs_all"


def build(
    data: stages.data.Data, tree: stages.tree.Tree, config: stages.train.Config, encoder=None
):
    """A Cascade without cluster levels. `tree`: root and slots only."""
    model = stages.model.build(data, tree, config, encoder)
    # With one level alone, stage 3 would set another dropout. Take the published one of the labels.
    model.dropout[0].p = stages.model.DROPOUT[3][-1]
    return model


def folder_name(config: Config) -> str:
    return NAME


@common.owns_its_folder(folder_name)
def run(config: Config) -> None:
    # Empty settings are chosen anew: the cascade's have an entry for each of its cluster levels.
    train_on_tree(config.run, NAME, none, build, topk="", layers="", dropout="")


if __name__ == "__main__":
    main(run, Config, __doc__)
