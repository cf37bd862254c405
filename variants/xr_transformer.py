"""XR-Transformer (Zhang, Chang, Yu and Dhillon, NeurIPS 2021): one resolution at a time, on the cascade's tree.

    python -m variants.xr_transformer --run runs/demo
    python -m variants.xr_transformer --run runs/demo --warm none

Reads    RUN/data.npz, RUN/tree.npz, RUN/model.pt (its settings)
Writes   RUN/xr_transformer/    model.pt, log.jsonl, predictions.npz; with another --warm, RUN/xr_transformer-WARM/

What differs from the cascade:

- each resolution is trained by itself, coarse to fine, the encoder going on from the one above. All read the last
  layer. The cascade's passes are shared out as 3 : 4 : 6, and each stage has a schedule of its own;
- candidates are fixed for a stage: the children of a document's true parents (teacher forcing) and of the b best ones
  that the stage above finds for it (matcher-aware negatives), padded where documents have fewer;
- the loss is a squared hinge, w max(0, 1 - y z)^2; w of a positive node: the document's labels below it, else 1;
- a new resolution starts from a classifier on the features of the stage above: variants/staging.py; the first one,
  where the cascade trains its heads first, on those of the encoder as it was;
- a node's score is exp(-max(0, 1 - z)^3) times its parent's, in a beam of b.

To predict, every stage needs the encoder it was trained with. The authors throw these heads away for a linear ranker:
variants/ranker.py. Left out: their learning rates, batch size and dropout, the cascade's are taken; the choice of a
best epoch, since a stage goes on from the last.

Shapes   N documents, B batch, K parents, F children of each, P positive pairs, M nodes of a level, D width, b beam
"""

import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from plumbing.cli import flag, int_list, main, positive
from plumbing.errors import UserError
from plumbing.store import save_pt
from plumbing.training_log import logger
from variants import common
from variants.common import stages
from variants.staging import WARM_STARTS, Batch, Batches, shares, warm_start

NAME = "xr_transformer"
CHUNK = 4096  # documents whose cached features are scaled at a time


@dataclass(frozen=True)
class Config(common.Config):
    warm: str = flag("linear", "start of a new resolution: linear, inherit (the parent's weights) or none")
    b: int = flag(20, "parents of the stage above whose children are candidates", positive)


class XRTransformer(stages.model.Cascade):
    """A cascade of which one level is trained at a time: `stage`, counted from 0. `earlier`: the encoders of the levels
    above the last, as they were when their stage was over."""

    def __init__(self, encoder: stages.model.Encoder, tree: stages.tree.Tree, topk: list[int],
                 dropout: list[float] | None = None) -> None:
        layers = [[encoder.backbone.config.num_hidden_layers]] * (len(topk) + 1)
        super().__init__(encoder, tree, topk, layers, dropout=dropout)
        self.stage = len(topk)
        self.earlier = nn.ModuleList(copy.deepcopy(encoder).requires_grad_(False) for _ in topk)
        for head in self.heads:
            nn.init.constant_(head.bias, -1.0)  # the margin of what is wrong

    def nodes(self, label_P: Tensor, t: int) -> Tensor:
        """The nodes that labels are below; t counts levels from the root, 0."""
        return self.label_to_slot[label_P] // (self.counts[-1] // self.counts[t])

    def logits(self, x_BD: Tensor, parents_BK: Tensor, t: int) -> Tensor:
        """(B, K, F) of the children of the parents; -inf where there is none: for padding, in an empty slot."""
        gone_BKF = (parents_BK < 0)[..., None]
        parents_BK = parents_BK.clamp(min=0)
        if t == len(self.topk):
            gone_BKF = gone_BKF | self.empty[parents_BK]
        return self.heads[t](x_BD, parents_BK).masked_fill(gone_BKF, -torch.inf)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(squared hinge (1,), summed over the candidates and averaged over the documents; positive labels that are
        below no candidate ())."""
        t = self.stage
        z_BKF = self.logits(self.dropout[t](self.features(batch)[t]), batch.parents_BK, t)
        n_BKF = count(self.nodes(batch.label_P, t + 1), batch.doc_P, batch.parents_BK, z_BKF.shape[2])
        slack_BKF = torch.relu(1 - torch.where(n_BKF > 0, z_BKF, -z_BKF))  # of -inf: relu(1 - inf), without a gradient
        loss = (n_BKF.clamp(min=1) * slack_BKF.square()).sum() / len(z_BKF)
        return loss.view(1), len(batch.label_P) - n_BKF.sum()

    def down(self, x_BD: Tensor, parents_BK: Tensor, scores_BK: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """(nodes of level t + 1, their log scores) from scored parents: the best b, of labels all."""
        z_BKF = self.logits(x_BD, parents_BK, t)
        nodes = stages.tree.expand(parents_BK, z_BKF.shape[2])
        scores = (scores_BK[..., None] - torch.relu(1 - z_BKF).pow(3)).flatten(1)
        if t < len(self.topk):
            scores, places = scores.topk(self.topk[t], dim=1)
            nodes = nodes.gather(1, places)
        return nodes, scores

    @torch.no_grad()
    def predict(self, batch: stages.data.Batch, k: int, ranking: str = NAME) -> tuple[Tensor, Tensor]:
        """The k best labels of the beam and their log scores; every stage by its own encoder."""
        nodes = torch.zeros_like(batch.ids_BT[:, :1])
        scores = torch.zeros(nodes.shape, device=nodes.device)
        for t, encoder in enumerate([*self.earlier, self.encoder]):
            nodes, scores = self.down(self.features(batch, encoder)[t], nodes, scores, t)
        return stages.model.best_k(self.slot_to_label[nodes], scores, k)

    @torch.no_grad()
    def match(self, batches: Batches, above: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
        """([nodes (N, b), their log scores], features (N, D)) of the training documents, from those of the parents."""
        self.eval()
        rows_of, parts, t = batches.rows(0), [], self.stage
        for rows in rows_of:
            batch = batches.data.batch("train", rows, batches.max_len).to(self.slot_to_label.device)
            x_BD = self.features(batch)[t]
            scored = (torch.from_numpy(array[rows]).to(x_BD.device) for array in above)
            parts.append([array.cpu().numpy() for array in (*self.down(x_BD, *scored, t), x_BD)])
        back = np.argsort(np.concatenate(rows_of))
        *found, x_ND = (np.concatenate(arrays)[back] for arrays in zip(*parts, strict=True))
        return found, x_ND

    def next_stage(self, x_ND: np.ndarray, train: stages.data.Split, warm: str) -> None:
        """Put the encoder by, and start the next head from features (N, D) of the training documents."""
        self.earlier[self.stage].load_state_dict(self.encoder.state_dict())
        self.stage += 1
        self.start_head(x_ND, train, warm)

    def start_head(self, x_ND: np.ndarray, train: stages.data.Split, warm: str) -> None:
        """Start the head of this stage from features (N, D) of the training documents."""
        label_P = torch.from_numpy(train.labels.astype(np.int64)).to(self.empty.device)
        node_P = self.nodes(label_P, self.stage + 1).cpu().numpy()
        shape = len(x_ND), self.counts[self.stage + 1]
        Y_NM = csr_matrix((np.ones(len(node_P)), node_P, train.label_offsets), shape)
        above = self.heads[self.stage - 1] if self.stage else None
        warm_start(warm, above, self.heads[self.stage], x_ND, Y_NM)

    @torch.no_grad()
    def start(self, data: stages.data.Data, config: stages.train.Config, warm: str) -> None:
        """The cascade's start, as far as it applies: centre the features of a pretrained encoder, and start the first
        head from them before the encoder is trained, as the later heads start from those of the stage above."""
        encoded = stages.train.encode(self, data, config, stop=lambda: False).encoded["train"]
        stages.train.center(self, encoded)
        parts = [slice(start, start + CHUNK) for start in range(0, len(encoded), CHUNK)]
        x_ND = np.concatenate([self.scaled(torch.from_numpy(encoded[part]).to(self.empty.device))[:, 0].cpu().numpy()
                               for part in parts])
        self.start_head(x_ND, data.splits["train"], warm)

    def param_groups(self, lr: float, lr_encoder: float) -> list[dict]:
        """Without the rows of labels until their stage has come."""
        groups = super().param_groups(lr, lr_encoder)
        return [group for group in groups if not group["rows"] or self.stage == len(self.topk)]


def count(node_P: Tensor, doc_P: Tensor, parents_BK: Tensor, fan: int) -> Tensor:
    """(B, K, fan): how many of its document's nodes `node_P` each candidate is; stages.tree.match says whether."""
    pair, place = (parents_BK[doc_P] == (node_P // fan)[:, None]).nonzero(as_tuple=True)
    counts_BKF = torch.zeros(*parents_BK.shape, fan, device=parents_BK.device)
    one = torch.ones(len(pair), device=parents_BK.device)
    return counts_BKF.index_put_((doc_P[pair], place, node_P[pair] % fan), one, accumulate=True)


def build(data: stages.data.Data, tree: stages.tree.Tree, config: stages.train.Config, backbone=None) -> XRTransformer:
    """What stages.train.load needs."""
    encoder = stages.model.build(data, tree, replace(config, layers=""), backbone).encoder
    dropout = stages.model.rates(config.dropout, len(tree.levels) + 1)
    model = XRTransformer(encoder, tree, int_list(config.topk, "--topk"), dropout)
    leaf = model.heads[-1].weight
    leaf.data = leaf.data.bfloat16() if config.label_bf16 else leaf.data
    return model


def train(out: Path, config: stages.train.Config, warm: str) -> tuple[XRTransformer, float]:
    """(the model, seconds) after all stages, one after the other; log.jsonl has the records of all."""
    data, tree = stages.data.load(out), stages.tree.load(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, n = build(data, tree, config).to(device), len(data.splits["train"])
    model.amp, start = config.amp, time.perf_counter()
    above = [np.zeros((n, 1), np.int64), np.zeros((n, 1), np.float32)]  # the root, whose score is 1
    if config.head_epochs:
        model.stage = 0
        model.start(data, config, warm)
    for t, epochs in enumerate(shares(config.epochs, len(model.heads))):
        model.stage = t
        print(f"level {t + 1} of {len(model.heads)}: {model.counts[t + 1]:,} nodes, {epochs} passes", flush=True)
        parent_L = model.nodes(torch.arange(len(data.names), device=device), t).cpu().numpy()
        now = replace(config, epochs=epochs, seed=config.seed + t)
        batches, log = Batches(data, now, above[0], parent_L), logger(out, now)
        stages.train.fit(model, batches, now, lambda record, log=log, t=t: log({"level": t + 1} | record))
        if t < len(model.topk):
            above, x_ND = model.match(batches, above)
            model.next_stage(x_ND, data.splits["train"], warm)
    return model.eval(), time.perf_counter() - start


def run(config: Config) -> None:
    if config.warm not in WARM_STARTS:
        raise UserError(f"--warm {config.warm}: expected one of {', '.join(WARM_STARTS)}")
    name = NAME if config.warm == "linear" else f"{NAME}-{config.warm}"
    out = common.folder(config.run, name, "data.npz", "tree.npz")
    (out / "log.jsonl").unlink(missing_ok=True)
    topk = ",".join(str(min(config.b, n)) for n in stages.tree.load(out).levels)
    settings = common.cascade_settings(config.run, out, topk=topk)
    model, seconds = train(out, settings, config.warm)
    save_pt(out / "model.pt", settings, {
        "config": settings(settings), "encoder": model.encoder.backbone.config.to_dict(), "ranking": NAME,
        "model": model.state_dict()}, ("data.npz", "tree.npz"), stage=f"variants/{NAME}.py")
    common.test(out, model, settings, NAME, seconds)


if __name__ == "__main__":
    main(run, Config, __doc__)
