"""XR-Transformer (Zhang, Chang, Yu and Dhillon, NeurIPS 2021): one level at a time, on the
cascade's tree.

    python -m variants.xr_transformer --run runs/demo
    python -m variants.xr_transformer --run runs/demo --warm none

Reads    RUN/data.npz, RUN/tree.npz, RUN/model.pt (its settings)
Writes   RUN/xr_transformer/    model.pt, log.jsonl, predictions.npz, predictions.val.npz;
         with another --warm, RUN/xr_transformer-WARM/

The cascade trains all levels at once. XR-Transformer trains them one after the other, from coarse
to fine: each level starts from what the level above has learnt, and its candidates are fixed
beforehand. The training of one level is called a stage. What differs from the cascade:

- Every level is trained by itself, and the encoder goes on from the level above. All read the last
  layer. The cascade's passes are shared out as 3 : 4 : 6, and each stage has a schedule of its own.
- Candidates are fixed for a stage: the children of a document's true parents (teacher forcing), and
  of the b best parents that the stage above finds for it (matcher-aware negatives).
- The loss is a squared hinge, w max(0, 1 - y z)^2, for a score z and a target y of +1 or -1. A
  score beyond 1 on the right side costs nothing. The weight w is the number of the document's
  labels below a positive node, and 1 otherwise.
- A new level starts from a classifier on the features of the stage above (variants/staging.py). The
  first one, where the cascade trains its heads first, starts from the encoder as it was.
- A node's score is exp(-max(0, 1 - z)^3) times its parent's, in a beam of b.

To predict, every stage needs the encoder it was trained with. The authors throw these heads away
and train a linear ranker: variants/ranker.py. Left out: their learning rates, batch size and
dropout (the cascade's are taken); the choice of a best epoch, since a stage goes on from the last.

Shapes   N documents, B documents of a batch, K parents of a document, F children of each (fan),
         P (document, label) pairs, M nodes of a level, D width, b width of the beam, L labels
"""

import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from plumbing.cli import flag, main, positive
from plumbing.errors import UserError
from plumbing.training_log import logger
from variants import common
from variants.common import stages
from variants.staging import WARM_STARTS, Batch, Batches, shares, warm_start

NAME = "xr_transformer"
CHUNK = 4096  # documents whose cached features are scaled at a time


@dataclass(frozen=True)
class Config(common.Config):
    warm: str = flag(
        "linear", "start of a new level: linear, inherit (the parent's weights) or none"
    )
    b: int = flag(20, "parents of the stage above whose children are candidates", positive)


# 1. The model: a cascade with another loss, and an encoder for each level.


class XRTransformer(stages.model.Cascade):
    """A cascade of which one level is trained at a time: `stage`, counted from 0.

    `earlier` are the encoders of the levels above the last, as they were when their stage was over.
    """

    def __init__(self, *arguments, **more) -> None:
        super().__init__(*arguments, **more)
        # A model that was loaded is ready to predict: its stage is the last.
        self.stage = len(self.topk)
        # A place for the encoder of every level above the labels, filled when its stage is over.
        self.earlier = nn.ModuleList()
        for _ in self.topk:
            not_trained = copy.deepcopy(self.encoder).requires_grad_(False)
            self.earlier.append(not_trained)
        # Nearly all nodes are wrong for a document, and -1 is the score asked of them.
        for head in self.heads:
            nn.init.constant_(head.bias, -1.0)

    def logits(self, x_BD: Tensor, parents_BK: Tensor, t: int) -> Tensor:
        """(B, K, F) of the children of the parents; -inf for padding and in an empty slot."""
        # 1. A document with fewer parents is padded with -1. The head scores cluster 0 there, and
        #    these scores are crossed out.
        gone_BKF = (parents_BK < 0)[..., None]
        parents_BK = parents_BK.clamp(min=0)
        # 2. At the label level, slots without a label are crossed out, too.
        is_label_level = t == len(self.topk)
        if is_label_level:
            gone_BKF = gone_BKF | self.empty[parents_BK]
        z_BKF = self.heads[t](x_BD, parents_BK)
        return z_BKF.masked_fill(gone_BKF, -torch.inf)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(squared hinge (1,), positive labels that are below no candidate ()).

        The hinge is summed over the candidates and averaged over the documents.
        """
        # 1. Score the candidates of the level whose turn it is.
        t = self.stage
        x_BD = self.dropout[t](self.features(batch)[t])
        z_BKF = self.logits(x_BD, batch.parents_BK, t)
        fan = z_BKF.shape[2]
        # 2. How many of the document's labels are below each of them?
        node_P = self.nodes(batch.label_P, t)
        n_BKF = count(node_P, batch.doc_P, batch.parents_BK, fan)
        # 3. y z is z where the node is positive, and -z elsewhere. Of z = -inf: relu(1 - inf) is 0,
        #    and has no gradient.
        yz_BKF = torch.where(n_BKF > 0, z_BKF, -z_BKF)
        slack_BKF = torch.relu(1 - yz_BKF)
        # 4. A node with many of the document's labels weighs more: to miss it costs all of them.
        weight_BKF = n_BKF.clamp(min=1)
        loss = (weight_BKF * slack_BKF.square()).sum() / len(z_BKF)
        n_missed = len(batch.label_P) - n_BKF.sum()
        return loss.view(1), n_missed

    def down(
        self, x_BD: Tensor, parents_BK: Tensor, scores_BK: Tensor, t: int
    ) -> tuple[Tensor, Tensor]:
        """(nodes of level t + 1, their log scores): the best b below scored parents; all labels."""
        z_BKF = self.logits(x_BD, parents_BK, t)
        fan = z_BKF.shape[2]
        nodes = stages.tree.expand(parents_BK, fan)
        # The logarithm of exp(-max(0, 1 - z)^3). A product of scores is a sum of logarithms.
        own_BKF = -torch.relu(1 - z_BKF).pow(3)
        scores = (scores_BK[..., None] + own_BKF).flatten(1)
        # Below the label level nothing follows, so all labels that were scored are given.
        if t < len(self.topk):
            best = scores.topk(self.topk[t], dim=1)
            scores = best.values
            nodes = nodes.gather(1, best.indices)
        return nodes, scores

    @torch.no_grad()
    def predict(
        self, batch: stages.data.Batch, k: int, ranking: str = NAME
    ) -> tuple[Tensor, Tensor]:
        """The k best labels of the beam and their log scores; every stage by its own encoder."""
        nodes = torch.zeros_like(batch.ids_BT[:, :1])  # the root, whose log score is 0
        scores = torch.zeros(nodes.shape, device=nodes.device)
        for t, encoder in enumerate([*self.earlier, self.encoder]):
            # Every level has an encoder of its own, so the documents are read once for each level.
            x_BD = self.features(batch, encoder)[t]
            nodes, scores = self.down(x_BD, nodes, scores, t)
        # The nodes of the last level are slots.
        labels = self.slot_to_label[nodes]
        return stages.model.best_k(labels, scores, k)

    @torch.no_grad()
    def match(
        self, batches: Batches, above: list[np.ndarray]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """What this stage finds for the training documents: candidates of the next stage.

        ([nodes (N, b), their log scores], features (N, D)) from the same of the parents, `above`.
        """
        self.eval()
        t = self.stage
        device = self.slot_to_label.device
        # 1. One level down from the parents that the earlier stages found, batch by batch:
        #    documents of about one length together.
        rows_of = batches.rows(0)
        above_nodes, above_scores = above
        found_nodes = []
        found_scores = []
        features = []
        for rows in rows_of:
            batch = batches.data.batch("train", rows, batches.max_len).to(device)
            x_BD = self.features(batch)[t]
            parents = torch.from_numpy(above_nodes[rows]).to(device)
            parent_scores = torch.from_numpy(above_scores[rows]).to(device)
            nodes, scores = self.down(x_BD, parents, parent_scores, t)
            found_nodes.append(nodes.cpu().numpy())
            found_scores.append(scores.cpu().numpy())
            features.append(x_BD.cpu().numpy())
        # 2. Back into the corpus' order: the inverse of a permutation is what sorts it.
        back = np.argsort(np.concatenate(rows_of))
        nodes_Nb = np.concatenate(found_nodes)[back]
        scores_Nb = np.concatenate(found_scores)[back]
        x_ND = np.concatenate(features)[back]
        return [nodes_Nb, scores_Nb], x_ND

    def next_stage(self, x_ND: np.ndarray, train: stages.data.Split, warm: str) -> None:
        """Put the encoder by, and start the next head from features (N, D) of the documents."""
        # The encoder will go on learning, and this level will need it as it is now.
        self.earlier[self.stage].load_state_dict(self.encoder.state_dict())
        self.stage += 1
        self.start_head(x_ND, train, warm)

    def start_head(self, x_ND: np.ndarray, train: stages.data.Split, warm: str) -> None:
        """Start the head of this stage from features (N, D) of the training documents."""
        t = self.stage
        # Which nodes of this level are above the labels of each document: Y (N, M).
        label_P = torch.from_numpy(train.labels.astype(np.int64)).to(self.empty.device)
        node_P = self.nodes(label_P, t).cpu().numpy()
        shape = (len(x_ND), self.counts[t + 1])
        ones = np.ones(len(node_P))
        Y_NM = csr_matrix((ones, node_P, train.label_offsets), shape)
        # The first level has no level above it to inherit from.
        above = self.heads[t - 1] if t else None
        warm_start(warm, above, self.heads[t], x_ND, Y_NM)

    @torch.no_grad()
    def start(self, data: stages.data.Data, config: stages.train.Config, warm: str) -> None:
        """The cascade's start, as far as it applies.

        Centre the features of a pretrained encoder, and start the first head from them before the
        encoder is trained, as the later heads start from the features of the stage above.
        """
        # 1. Run the encoder once over the training documents, and centre what it gives.
        with_features = stages.train.encode(self, data, config, stages.train.never)
        encoded_NHD = with_features.encoded["train"]
        stages.train.center(self, encoded_NHD)
        # 2. The features as the model will see them: centred and scaled. All levels read one hidden
        #    state, the last, so it is number 0 of those that are kept.
        parts = []
        for start in range(0, len(encoded_NHD), CHUNK):
            part = torch.from_numpy(encoded_NHD[start : start + CHUNK]).to(self.empty.device)
            scaled_BHD = self.scaled(part)
            parts.append(scaled_BHD[:, 0].cpu().numpy())
        # 3. The head of the first level.
        self.start_head(np.concatenate(parts), data.splits["train"], warm)

    def param_groups(self, lr: float, lr_encoder: float) -> list[dict]:
        """Without the rows of labels until their stage has come."""
        # In an earlier stage no label is scored, so there is no gradient to train them by.
        groups = super().param_groups(lr, lr_encoder)
        is_last = self.stage == len(self.topk)
        return [group for group in groups if is_last or not group["rows"]]


# 2. What the model and its training are made of.


def count(node_P: Tensor, doc_P: Tensor, parents_BK: Tensor, fan: int) -> Tensor:
    """(B, K, F): how many of its document's labels are below each candidate.

    stages.tree.match says only whether there is one.
    """
    # 1. Where among its document's parents is the parent of each label's node? Where the
    #    parent is not among them, nothing is counted.
    is_parent_PK = parents_BK[doc_P] == (node_P // fan)[:, None]
    pair, place = is_parent_PK.nonzero(as_tuple=True)
    # 2. Add 1 in the cell of its node: document, place of the parent, number of the child. Labels
    #    below the same node are added up.
    counts_BKF = torch.zeros(*parents_BK.shape, fan, device=parents_BK.device)
    one = torch.ones(len(pair), device=parents_BK.device)
    where = (doc_P[pair], place, node_P[pair] % fan)
    return counts_BKF.index_put_(where, one, accumulate=True)


def build(
    data: stages.data.Data, tree: stages.tree.Tree, config: stages.train.Config, encoder=None
) -> XRTransformer:
    """What stages.train.load needs."""
    return common.build_on_last_layer(XRTransformer, data, tree, config, encoder)


# 3. Training, stage after stage.


def train(out: Path, config: stages.train.Config, warm: str) -> tuple[XRTransformer, float]:
    """(the model, seconds) after all stages. log.jsonl has the records of all."""
    data = stages.data.load(out)
    tree = stages.tree.load(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(data, tree, config).to(device)
    model.amp = config.amp
    n = len(data.splits["train"])
    n_stages = len(model.heads)
    start = time.perf_counter()
    # Everything begins at the root, node 0, with log score 0.
    above = [np.zeros((n, 1), np.int64), np.zeros((n, 1), np.float32)]
    # Where the cascade trains its heads first, the first head gets a start from the encoder, too.
    if config.head_epochs:
        model.stage = 0
        model.start(data, config, warm)
    for t, epochs in enumerate(shares(config.epochs, n_stages)):
        model.stage = t
        n_nodes = model.counts[t + 1]
        print(f"level {t + 1} of {n_stages}: {n_nodes:,} nodes, {epochs} passes", flush=True)
        # 1. The candidates: what the stage above found, and the parents of the correct labels.
        every_label = torch.arange(len(data.names), device=device)
        parent_L = model.nodes(every_label, t - 1).cpu().numpy()  # level -1: the root
        # Another seed, so that a stage does not see its documents in the order of the last one.
        stage_config = replace(config, epochs=epochs, seed=config.seed + t)
        batches = Batches(data, stage_config, above[0], parent_L)
        # 2. Train this level and the encoder.
        write = logger(out, stage_config)

        def log(record: dict, write=write, level: int = t + 1) -> None:
            write({"level": level} | record)

        stages.train.fit(model, batches, stage_config, log)
        # 3. What does it find? These are the candidates and the warm start of the next level.
        if t < len(model.topk):
            above, x_ND = model.match(batches, above)
            model.next_stage(x_ND, data.splits["train"], warm)
    return model.eval(), time.perf_counter() - start


def folder_name(config: Config) -> str:
    return common.name_with(NAME, config, "warm")


@common.owns_its_folder(folder_name)
def run(config: Config) -> None:
    if config.warm not in WARM_STARTS:
        raise UserError(f"--warm {config.warm}: expected one of {', '.join(WARM_STARTS)}")
    levels = common.tree_with_clusters(config.run).levels
    # 1. A run folder of its own, without what an interrupted training has left.
    out = common.folder(config.run, folder_name(config), "data.npz", "tree.npz")
    common.clear(out)
    # 2. The cascade's settings, but for the beam: b clusters, or all where a level has fewer.
    topk = ",".join(str(min(config.b, n)) for n in levels)
    train_config = common.cascade_settings(config.run, out, topk=topk)
    # 3. Train, and write model.pt.
    model, seconds = train(out, train_config, config.warm)
    common.save_model(out, model, train_config, NAME, NAME)
    # 4. Predict the validation and test splits.
    common.test(out, model, train_config, NAME, seconds)


if __name__ == "__main__":
    main(run, Config, __doc__)
