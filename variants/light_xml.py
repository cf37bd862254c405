"""LightXML (Jiang et al., AAAI 2021): two resolutions that read the same feature. Does each need
its own layer?

    python -m variants.light_xml --run runs/demo

Reads    RUN/data.npz, RUN/tree.npz, RUN/model.pt (its settings)
Writes   RUN/light_xml/    a run folder: tree.npz, model.pt, predictions.npz, ...

A resolution is a level of the label tree: coarse clusters, finer clusters, labels. What differs
from the cascade:

- There is one cluster level, the finest one of the same tree, and the labels.
- Both read one feature: the last five hidden states side by side, up to the last that the cascade
  reads, through one linear map. Clusters and labels pull on the same numbers, where the cascade
  gives each resolution its own layer.

The shortlist with its hard negatives, loss, optimisers and passes are the cascade's. Dropout is 0.3
at both levels, as 03_model.py sets it for a tree of two levels. Of the authors' model this leaves
out weight averaging and the order of things in the middle: their clusters read the hidden states
side by side, and their labels a narrower feature made of them. To take the layers apart from the
number of levels, train the cascade itself on one layer: 04_train.py --layers 12,12,12.
"""

from pathlib import Path

from plumbing.cli import main
from plumbing.store import load_pt
from variants import common
from variants.common import Config, finest, stages, train_on_tree

NAME = "light_xml"


def last_five(depth: int) -> str:
    """--layers for two levels that both read the last five hidden states."""
    # An encoder with fewer layers has fewer hidden states. Number 0, the embeddings, is left out.
    first = max(1, depth - 4)
    side_by_side = "+".join(str(layer) for layer in range(first, depth + 1))
    # The same for the clusters and for the labels.
    return f"{side_by_side},{side_by_side}"


def build(
    data: stages.data.Data, tree: stages.tree.Tree, config: stages.train.Config, encoder=None
):
    """A Cascade with one cluster level. Both levels share the map from hidden states to feature."""
    model = stages.model.build(data, tree, config, encoder)
    # A cascade has a map for each level. Here the second level takes the map of the first.
    model.join[1] = model.join[0]
    return model


def folder_name(config: Config) -> str:
    return NAME


@common.owns_its_folder(folder_name)
def run(config: Config) -> None:
    # 1. The last hidden state that the cascade reads: "7+8,10,12" gives 12.
    content, _ = load_pt(Path(config.run) / "model.pt")
    cascade = content["config"]
    layers = cascade["layers"].replace("+", ",").split(",")
    last_layer = max(int(layer) for layer in layers)
    # 2. The one cluster level keeps as many clusters as the cascade keeps at that level.
    topk = cascade["topk"].split(",")[-1]
    train_on_tree(
        config.run, NAME, finest, build, topk=topk, layers=last_five(last_layer), dropout=""
    )


if __name__ == "__main__":
    main(run, Config, __doc__)
