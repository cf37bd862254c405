"""ELIAS (Gupta et al., NeurIPS 2022; arXiv 2210.08410): the tree over the labels is learned, too.

    python -m variants.elias --run runs/demo
    python -m variants.elias --run runs/demo --edges tree       the same passes, the tree stays
    python -m variants.elias --run runs/demo --edges alike      the edges are found, not weighed
    python -m variants.elias --run runs/demo --shuffle          from a random tree

Reads    RUN/data.npz, RUN/tree.npz, RUN/model.pt (its settings)
Writes   RUN/elias/    tree.npz (one level), model.pt, log.jsonl, predictions.npz,
         predictions.val.npz; with other settings RUN/elias-alike/ or the like

In a tree a label is below one cluster, and a mistake made there is never mended. ELIAS has one
level of clusters, and a label may hang below many of them: every cluster has E edges to labels,
each with a strength between 0 and 1. The strengths are learned with everything else, because the
score of a label contains them:

    s_c   = min(1, alpha softmax over clusters of (w_c x + b_c))    how well cluster c fits
    a_cl  = min(1, beta softmax over the edges of c of theta_cl)    how strongly c holds label l
    q_l   = max over the clusters c in the beam of s_c a_cl         the best path to label l
    p_l   = q_l sigmoid(w_l x + b_l)

The factors alpha and beta let as many clusters, and edges of a cluster, be 1 at a time. A beam is
the b best clusters; alpha is b here. The K labels with the largest q are scored: the shortlist. A
fixed tree is a special case: with F edges that are alike and beta above F, every strength is 1.

What differs from the cascade:

- There is one cluster level, the first of the run's tree, and it is a softmax. Clusters and labels
  read the last layer.
- Stage 1 (two fifths of the passes) trains with the fixed tree. Then the edges are found: cluster c
  gets the E labels whose training documents had most of c in their beams. Stage 2 starts the label
  classifiers anew and learns the strengths. Encoder and clusters move more slowly from then on.
- The loss is the cross-entropy of p over the shortlist, summed as in the cascade, plus --pull times
  the mean of -log q over a document's labels that the beam reaches.

Other than the authors', on purpose. They take means over documents x candidates, and over documents
x most labels of any; their weight of .05 with K = 2000 is then about our 100. In training their
beam is drawn at random and may lose correct clusters; here clusters that hold a correct label go
first (03_model.py, shortlist), and correct labels are always in the shortlist where a path leads to
them. A label stays below the cluster that the tree gave it: otherwise rare labels would be out of
reach. Padded edges have no share in the softmax. Edges start alike (theirs: at random), and labels
with a bias that knows their frequency below their cluster (theirs: at random).
Left out: a second clustering by the encoder's features, averaged weights, a sparse ranker
(variants/ranker.py). q is made for all labels of a batch at once: fine to 10^5 labels.

Shapes   N documents, B documents of a batch, D width, C clusters, F labels of a cluster in the tree
         (slots), E edges of a cluster, K labels scored, b clusters in a beam, L labels,
         P (document, label) pairs
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from plumbing.cli import flag, main, positive
from plumbing.errors import UserError
from plumbing.training_log import logger
from variants import common
from variants.common import stages
from variants.edges import find_edges, start_clusters, start_labels, strongest_holder

NAME = "elias"
EDGES = ("learned", "alike", "tree", "once")
BETA = 1.8  # edges of a cluster that can be 1 together, as a multiple of F
FAN = 7  # edges of a cluster, as a multiple of F
MORE = 5  # clusters that a beam in training has more than one in prediction
# Learning rates of stage 2, as a share of those of stage 1.
SLOW_ENCODER = 0.3
SLOW_CLUSTERS = 0.1


@dataclass(frozen=True)
class Config(common.Config):
    edges: str = flag(
        "learned",
        "learned: ELIAS; alike: found, but all of one strength; tree: the tree's, and all else of "
        "stage 2; once: the tree's, all passes in stage 1",
    )
    b: int = flag(10, "clusters in the beam", positive)
    pull: float = flag(30.0, "weight of -log q in stage 2")
    shuffle: bool = flag(False, "start from a random tree: labels in random clusters")


# 1. The model: clusters, edges and labels.


class ELIAS(stages.model.Cascade):
    """A cascade with one cluster level, whose clusters hold labels by edges with strengths."""

    def __init__(self, *arguments, **more) -> None:
        super().__init__(*arguments, **more)
        n_clusters = self.counts[1]
        self.n_labels = len(self.label_to_slot)
        self.scored = min(self.topk[0] * self.slots, self.n_labels)  # K
        # The classifier of the labels: row l is label l, whatever cluster holds it.
        self.heads[1] = stages.model.Head(self.n_labels, 1, self.encoder.width, sparse=True)
        # The edges: labels of each cluster, -1 where it has fewer. First those of the tree.
        tree_CF = self.slot_to_label.view(n_clusters, self.slots)
        n_edges = max(self.slots, min(FAN * self.slots, self.n_labels))
        self.edge_CE = nn.Buffer(functional.pad(tree_CF, (0, n_edges - self.slots), value=-1))
        self.theta_CE = nn.Parameter(torch.zeros(n_clusters, n_edges))
        # The cluster that stands for each label in teacher forcing.
        self.parent_L = nn.Buffer(self.label_to_slot // self.slots)
        self.pull = 0.0  # weight of -log q
        self.is_slow = False  # stage 2: what stage 1 has trained moves slowly

    @property
    def slots(self) -> int:
        """F: places for labels in each cluster of the tree."""
        return self.counts[-1] // self.counts[1]

    # The index: from a feature to the labels that are worth scoring. All in logarithms: a product
    # of probabilities is a sum, and nothing becomes 0 by rounding.

    def log_s(self, x_BD: Tensor) -> Tensor:
        """(B, C), <= 0: how well every cluster fits."""
        root_B1 = torch.zeros(len(x_BD), 1, dtype=torch.long, device=x_BD.device)
        z_BC = self.heads[0](x_BD, root_B1)[:, 0]
        # At the bound the gradient stops: a cluster at 1 is not pushed any further.
        return (math.log(self.topk[0]) + z_BC.log_softmax(1)).clamp(max=0)

    def log_a(self) -> Tensor:
        """(C, E), <= 0: how strongly each cluster holds each of its labels; -inf for padding."""
        theta_CE = self.theta_CE.masked_fill(self.edge_CE < 0, -torch.inf)
        return (math.log(BETA * self.slots) + theta_CE.log_softmax(1)).clamp(max=0)

    def beam_of(self, log_s_BC: Tensor, batch: stages.data.Batch | None) -> Tensor:
        """(B, b) clusters. In training, with the batch: a few more, and correct ones go first."""
        s_BC = log_s_BC.detach().exp()
        if batch is None:
            return s_BC.topk(self.topk[0], dim=1).indices
        # As in the cascade: a cluster that holds a correct label is raised by 1.
        s_BC[batch.doc_P, self.parent_L[batch.label_P]] += 1
        width = min(self.topk[0] + MORE, s_BC.shape[1])
        return s_BC.topk(width, dim=1).indices

    def log_q(self, log_s_BC: Tensor, beam_Bb: Tensor) -> Tensor:
        """(B, L): the best path to every label through a document's beam; -inf without one.

        In plain form: log q[l] = max over c in beam, over e with edge[c, e] = l, of
        log s[c] + log a[c, e].
        """
        # 1. All paths: a cluster of the beam, and an edge of it.
        log_s_Bb = log_s_BC.gather(1, beam_Bb)
        log_a_BbE = functional.embedding(beam_Bb, self.log_a())  # the rows of the beam's clusters
        path_BX = (log_s_Bb[..., None] + log_a_BbE).flatten(1)  # X = b E paths
        label_BX = self.edge_CE[beam_Bb].flatten(1)
        # 2. The maximum for each label. One more column takes the padded edges, and is cut off.
        label_BX = label_BX.where(label_BX >= 0, self.n_labels)
        none_BL1 = path_BX.new_full((len(path_BX), self.n_labels + 1), -torch.inf)
        best_BL1 = none_BL1.scatter_reduce(1, label_BX, path_BX, "amax")
        return best_BL1[:, : self.n_labels]

    @torch.no_grad()
    def update_parents(self) -> None:
        """parent_L: the cluster that holds each label most strongly."""
        self.parent_L.copy_(strongest_holder(self.edge_CE, self.log_a(), self.n_labels))

    # Training.

    def loss(self, batch: stages.data.Batch) -> tuple[Tensor, Tensor]:
        """(cross-entropy of the shortlist, and of the index (2,); labels without a path ())."""
        # 1. From the document to the log q of all labels.
        x_BD = self.dropout[1](self.features(batch)[1])
        log_s_BC = self.log_s(x_BD)
        beam_Bb = self.beam_of(log_s_BC, batch)
        log_q_BL = self.log_q(log_s_BC, beam_Bb)
        is_reached_BL = log_q_BL > -torch.inf
        is_correct_BL = torch.zeros_like(is_reached_BL)
        is_correct_BL[batch.doc_P, batch.label_P] = True
        # 2. The shortlist: correct labels that have a path, then the largest q. These are the hard
        #    negatives.
        order_BL = log_q_BL.detach().masked_fill(is_correct_BL & is_reached_BL, 1.0)
        labels_BK = order_BL.topk(self.scored, dim=1, sorted=False).indices
        # 3. Cross-entropy of p = q sigmoid(z).
        log_p_BK = self.log_p(x_BD, log_q_BL, labels_BK)
        shortlist_loss = cross_entropy(log_p_BK, is_correct_BL.gather(1, labels_BK))
        # 4. The index alone: -log q, the mean of a document's reached labels.
        log_q_P = log_q_BL[batch.doc_P, batch.label_P]
        is_reached_P = log_q_P > -torch.inf
        n_reached_B = (is_correct_BL & is_reached_BL).sum(1).clamp(min=1)
        share_P = is_reached_P / n_reached_B[batch.doc_P]
        index_loss = -(log_q_P.where(is_reached_P, 0.0) * share_P).sum()
        losses = torch.stack([shortlist_loss, self.pull * index_loss]) / len(x_BD)
        return losses, (~is_reached_P).sum()

    def log_p(self, x_BD: Tensor, log_q_BL: Tensor, labels_BK: Tensor) -> Tensor:
        """(B, K): log of q sigmoid(z) for the labels of a shortlist."""
        # A label is a cluster of one child to the head.
        z_BK = self.heads[1](x_BD, labels_BK)[..., 0]
        return log_q_BL.gather(1, labels_BK) + functional.logsigmoid(z_BK)

    def param_groups(self, lr: float, lr_encoder: float) -> list[dict]:
        """Those of the cascade. In stage 2 encoder and clusters move more slowly."""
        share = {}
        if self.is_slow:
            share |= {id(parameter): SLOW_ENCODER for parameter in self.encoder.parameters()}
            share |= {id(parameter): SLOW_CLUSTERS for parameter in self.heads[0].parameters()}
        groups = []
        for group in super().param_groups(lr, lr_encoder):
            for parameter in group["params"]:
                if parameter.requires_grad:
                    rate = group["lr"] * share.get(id(parameter), 1.0)
                    groups.append(group | {"params": [parameter], "lr": rate})
        return groups

    # Prediction.

    @torch.no_grad()
    def predict(
        self, batch: stages.data.Batch, k: int, ranking: str = NAME
    ) -> tuple[Tensor, Tensor]:
        """The k best labels of the shortlist and their log p."""
        x_BD = self.features(batch)[1]
        log_s_BC = self.log_s(x_BD)
        log_q_BL = self.log_q(log_s_BC, self.beam_of(log_s_BC, None))
        labels_BK = log_q_BL.topk(self.scored, dim=1).indices
        log_p_BK = self.log_p(x_BD, log_q_BL, labels_BK)
        # Where fewer than K labels have a path, the rest is no prediction.
        labels_BK = labels_BK.where(log_p_BK > -torch.inf, -1)
        return stages.model.best_k(labels_BK, log_p_BK, k)


def cross_entropy(log_p_BK: Tensor, is_correct_BK: Tensor) -> Tensor:
    """-log p of correct candidates and -log(1 - p) of wrong ones, added up. No path: nothing."""
    is_scored_BK = log_p_BK > -torch.inf
    yes_BK = torch.where(is_correct_BK & is_scored_BK, log_p_BK, 0.0)
    # A p that rounds to 1 would make the loss infinite.
    p_BK = log_p_BK.exp().clamp(max=1 - 1e-6)
    no_BK = torch.where(is_correct_BK, 0.0, torch.log1p(-p_BK))
    return -(yes_BK + no_BK).sum()


def build(
    data: stages.data.Data, tree: stages.tree.Tree, config: stages.train.Config, encoder=None
) -> ELIAS:
    """What stages.train.load needs. `tree` has one level."""
    return common.build_on_last_layer(ELIAS, data, tree, config, encoder)


# 2. Training, in two stages.


class Batches(stages.train.Batches):
    """Stage 4's batches. Before each pass the labels look which cluster holds them most."""

    def __init__(self, model: ELIAS, data: stages.data.Data, config: stages.train.Config) -> None:
        super().__init__(data, config.batch_size, config.max_len, config.seed)
        self.model = model

    def __call__(self, epoch: int, first: int = 0) -> Iterator[stages.data.Batch]:
        self.model.update_parents()
        yield from super().__call__(epoch, first)


def first_stage(
    model: ELIAS,
    data: stages.data.Data,
    config: stages.train.Config,
    is_last: bool,
    log: Callable[[dict], None],
) -> float:
    """Encoder, clusters and labels, with the tree's edges; the seconds of validation.

    Stage 2 goes on from the last pass. Where there is none, the best pass is kept.
    """
    # 1. The cascade's start: biases that know frequencies and, with a pretrained encoder, centred
    #    features and heads that learn first.
    start_clusters(model, data.splits["train"])
    start_labels(model, data.splits["train"])
    if config.head_epochs:
        encoded = stages.train.encode(model, data, config, stages.train.never)
        stages.train.center(model, encoded.encoded["train"])
        alone = replace(config, epochs=config.head_epochs, lr=config.head_lr, amp="off")
        stages.train.fit(model, Batches(model, encoded, alone), alone, log)
    # 2. Everything.
    batches = Batches(model, data, config)
    if is_last:
        return common.fit_and_keep_best(model, batches, data, config, log)
    stages.train.fit(model, batches, config, log)
    return 0.0


def second_stage(
    model: ELIAS,
    data: stages.data.Data,
    config: stages.train.Config,
    edges: str,
    log: Callable[[dict], None],
) -> float:
    """The edges, and label classifiers from the beginning; the seconds of validation."""
    if edges != "tree":
        n_alone = find_edges(model, data, config)
        n_edges = int((model.edge_CE >= 0).sum())
        print(
            f"{n_edges:,} edges, {n_edges / model.n_labels:.1f} a label; {n_alone:,} labels with "
            "training documents hang by the tree's edge alone",
            flush=True,
        )
    # Strengths that do not learn stay alike: 1 of the tree's edges, less where there are more.
    model.theta_CE.requires_grad_(edges == "learned")
    model.update_parents()
    start_labels(model, data.splits["train"])
    model.is_slow = True
    return common.fit_and_keep_best(model, Batches(model, data, config), data, config, log)


def train(
    out: Path, data: stages.data.Data, config: stages.train.Config, edges: str, pull: float
) -> tuple[ELIAS, float]:
    """(the model after the best pass of its last stage, seconds without validating the passes).

    log.jsonl has the records of both stages.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(data, stages.tree.load(out), config).to(device)
    model.amp = config.amp
    # Two fifths of the passes for stage 1.
    passes = config.epochs if edges == "once" else round(0.4 * config.epochs)
    if passes < 1 or edges != "once" and passes == config.epochs:
        raise UserError(f"{config.epochs} epochs are too few; train the cascade with 2 or more")
    start = time.perf_counter()
    for stage, epochs in ((1, passes), (2, config.epochs - passes)):
        if not epochs:
            continue
        # Another seed, so that stage 2 does not see the documents in the same order.
        of_stage = replace(config, epochs=epochs, seed=config.seed + stage - 1)
        write = logger(out, of_stage)

        def log(record: dict, write=write, stage: int = stage) -> None:
            write({"stage": stage} | record)

        print(f"stage {stage}: {epochs} passes", flush=True)
        if stage == 1:
            validating = first_stage(model, data, of_stage, edges == "once", log)
        else:
            model.pull = pull
            validating = second_stage(model, data, of_stage, edges, log)
        print_recall(model, data, config, "val")
    # Of both stages, only the last has validated its passes.
    return model.eval(), time.perf_counter() - start - validating


def print_recall(
    model: ELIAS, data: stages.data.Data, config: stages.train.Config, split: str
) -> None:
    """Print what the shortlist finds, with the K labels that are scored, and P@1."""
    # All K labels: what is not among them is not found by any ranking.
    labels_NK, _ = common.predict(model, data, split, config, model.scored)
    weight_L = np.ones(model.n_labels)
    result = stages.eval.metrics(labels_NK, data.splits[split], weight_L)
    recall = result["R"]
    at_100 = recall[min(100, len(recall)) - 1]
    print(
        f"{split}: P@1 {result['P'][0]:.2f}  R@100 {at_100:.2f}  shortlist recall "
        f"{recall[-1]:.2f} with {model.scored} labels",
        flush=True,
    )


# 3. From the command line to a trained model.


def folder_name(config: Config) -> str:
    return common.name_with(NAME, config, "edges", "pull", "shuffle")


@common.owns_its_folder(folder_name)
def run(config: Config) -> None:
    if config.edges not in EDGES:
        raise UserError(f"--edges {config.edges}: expected one of {', '.join(EDGES)}")
    if not 0 <= config.pull < float("inf"):
        raise UserError(f"--pull {config.pull}: expected a number from 0 on")
    # 1. Of the run's tree only the first level; or labels in random clusters of the same size.
    tree = common.tree_with_clusters(config.run)
    out = common.folder(config.run, folder_name(config), "data.npz")
    common.clear(out)
    data = stages.data.load(out)
    n_clusters = tree.levels[0]
    b = min(config.b, n_clusters)
    train_config = common.cascade_settings(config.run, out, topk=str(b), layers="", dropout="")
    slots = tree.slot_to_label.copy()
    if config.shuffle:
        is_label = slots >= 0
        slots[is_label] = np.random.default_rng(train_config.seed).permutation(slots[is_label])
    common.save_tree(out, slots, [n_clusters])
    # 2. Train, and write model.pt.
    model, seconds = train(out, data, train_config, config.edges, config.pull)
    common.save_model(out, model, train_config, NAME, NAME)
    # 3. Predict the validation and test splits, and look at what was learned.
    common.test(out, model, train_config, NAME, seconds)
    print_recall(model, data, train_config, "test")
    model.update_parents()
    n_moved = int((model.parent_L != model.label_to_slot // model.slots).sum())
    print(f"{n_moved:,} of {model.n_labels:,} labels are held most by another cluster than before")


if __name__ == "__main__":
    main(run, Config, __doc__)
