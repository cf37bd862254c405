"""LightXML (Jiang et al., AAAI 2021): two resolutions that read the same feature. Does each need
its own layer?

    python -m variants.light_xml --run runs/demo

Reads    RUN/data.npz, RUN/tree.npz, RUN/model.pt (its settings)
Writes   RUN/light_xml/    a run folder: tree.npz, model.pt, predictions.npz, ...

What differs from the cascade:

- one cluster level, the finest one of the same tree, and the labels; - one feature for both: the
last five hidden states side by side, up to the last that the cascade reads, through one
  linear map. Clusters and labels pull on the same numbers, where the cascade gives each resolution
  its own layer.

The shortlist with its hard negatives, loss, optimisers and passes are the cascade's; dropout is 0.3
at both levels, what stage 3 gives to two. Of the authors' model this leaves out weight averaging
and the order of things in the middle: their clusters read the hidden states side by side, and their
labels a narrower feature made of them. To take the layers apart from the number of levels, train
the cascade itself on one layer: 04_train.py --layers 12,12,12.
"""

from pathlib import Path

from plumbing.cli import main
from plumbing.store import load_pt
from variants.common import Config, stages, train_on_tree

NAME = "light_xml"


def last_five(depth: int) -> str:
    """--layers for two levels that both read the last five hidden states."""
    return ",".join(["+".join(str(layer) for layer in range(max(1, depth - 4), depth + 1))] * 2)


def build(
    data: stages.data.Data, tree: stages.tree.Tree, config: stages.train.Config, encoder=None
):
    """A Cascade with one cluster level. Both levels share the map from hidden states to feature."""
    model = stages.model.build(data, tree, config, encoder)
    model.join[1] = model.join[0]
    return model


def run(config: Config) -> None:
    content, _ = load_pt(Path(config.run) / "model.pt")
    layers = max(int(layer) for layer in content["config"]["layers"].replace("+", ",").split(","))
    topk = content["config"]["topk"].split(",")[-1]
    train_on_tree(
        config.run,
        NAME,
        lambda levels: levels[-1:],
        build,
        topk=topk,
        layers=last_five(layers),
        dropout="",
    )


if __name__ == "__main__":
    main(run, Config, __doc__)
