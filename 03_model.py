"""Stage 3: the cascade, one encoder whose layers decide coarse to fine. Run by itself it walks through one batch.

    python 03_model.py --run runs/demo

Reads    RUN/data.npz, RUN/tree.npz
Writes   nothing; stage 4 trains this model

After CascadeXML (Kharbanda, Banerjee, Schultheis, Babbar; NeurIPS 2022). Every resolution of the label tree reads its
own layer of one transformer. The candidates at a resolution are the children of the best nodes of the one above; in
training the nodes with a positive label below them count as best, and the others, which scored high and are wrong, are
the hard negatives. The loss is binary cross-entropy over the candidates, summed over the resolutions.

Heads first. A pretrained encoder knows much and the heads, at the start, nothing: trained together, what the heads send
back is noise, and it damages the encoder before they have learnt to listen. So stage 4 runs the encoder over the corpus
once, keeps its features, and trains the heads alone on them, which takes minutes; then everything, end to end (linear
probing, then fine-tuning: Kumar et al., ICLR 2022). The features of any two documents are nearly equal, since both are
mostly the same mean vector: it is subtracted, and a hidden state is divided by one number, the standard deviation of
all its features together, since some features are always zero. A node's bias starts at the log odds of its documents.

Left out here: the authors' ensembles, several devices, one-vs-all without a tree.
Shapes   B batch, T tokens, D width, C clusters, F children of each (fan), K kept for a document,
         P positive pairs, S slots
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.cli import flag, int_list, main, natural, positive, settle
from plumbing.encoders import positions, pretrained_encoder, tiny_bert, without_waiting
from plumbing.errors import UserError
from plumbing.label_level import ShortlistProduct, product

data_stage = import_module("01_data")
tree_stage = import_module("02_label_tree")

RECIPES = {"tiny": {"max_len": 64, "pooling": "mean"}, "pretrained": {"max_len": 128, "pooling": "first"}}
DROPOUT = {3: (0.3, 0.3, 0.4), 4: (0.2, 0.25, 0.4, 0.5)}  # by the number of levels, as published; else 0.3
RANKINGS = ("parent", "path", "label")  # p(label) p(its cluster); the product down the whole path; p(label)


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/demo", "folder of this run's artifacts")
    max_len: int = flag(None, "tokens of a document, special ones included [tiny 64, else 128]", positive)
    topk: str = flag(None, "clusters kept per cluster level [192,384,768]", str)
    pooling: str = flag(None, "a document's feature: 'first' token or 'mean' of all [tiny mean, else first]", str)
    layers: str = flag("", "hidden states read per level, such as 5+6,8,10,12 (0: embeddings) [spaced by depth]")
    join: str = flag("map", "several hidden states of a level: 'map' to one feature, or 'none': read side by side")
    dropout: str = flag("", "of each level's feature, such as 0.2,0.25,0.4, or one number for all [as published]")
    label_bf16: bool = flag(False, "hold label weights in bfloat16, rounded stochastically: for millions of labels")
    tiny: str = flag("1,256", "layers and width of the encoder 'tiny'")
    seed: int = flag(0, "seed of every random choice", natural)


class Level(NamedTuple):
    """One resolution of one batch: the candidates are the F children of each of the K clusters kept above."""

    parents_BK: Tensor  # int64, nodes of the level above (the root: zeros (B, 1))
    picked_BK: Tensor | None  # int64, where they stood among the candidates of the level above; None below the root
    logits_BKF: Tensor  # float32, -inf in an empty slot
    targets_BKF: Tensor | None  # float32, 1 where a label below the node is positive; None without a teacher


def shortlist(logits_BKF: Tensor, targets_BKF: Tensor | None, k: int) -> Tensor:
    """Places (B, k) of the k best candidates among the K * F, ranked by sigmoid(logit) + [is positive]."""
    score = logits_BKF.detach() if targets_BKF is None else logits_BKF.detach().sigmoid() + targets_BKF
    return score.flatten(1).topk(k, dim=1, sorted=False).indices


def rank(logits_BKF: Tensor, above: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """{ranking: log-probability (B, K * F)} of candidates from their clusters' `above` (B, K); None below the root."""
    own = F.logsigmoid(logits_BKF)
    scores = {"label": own, "parent": own, "path": own}
    if above is not None:
        scores |= {"parent": own + above["label"][..., None], "path": own + above["path"][..., None]}
    return {name: score.flatten(1) for name, score in scores.items()}


def best_k(labels_BK: Tensor, scores_BK: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of scored labels: (labels (B, k), scores (B, k)), descending; -1 and -inf where there are fewer."""
    scores, places = F.pad(scores_BK, (0, k), value=-torch.inf).topk(k, dim=1)
    return F.pad(labels_BK, (0, k), value=-1).gather(1, places), scores


class Head(nn.Module):
    """A linear classifier per node; the children of one node are one contiguous block. Cluster levels are small: all
    nodes are scored. `sparse`, for labels: a batch reads the clusters of its shortlists, and RowAdam trains them."""

    def __init__(self, n_clusters: int, fan: int, width: int, sparse: bool = False) -> None:
        super().__init__()
        self.sparse = sparse
        self.weight = nn.Parameter(torch.zeros(n_clusters, fan, width))
        self.bias = nn.Parameter(torch.full((n_clusters, fan), -4.0))  # few nodes are positive: start with p = 0.02

    def forward(self, x_BD: Tensor, clusters_BK: Tensor) -> Tensor:
        """Logits (B, K, F) of the children of each document's clusters."""
        if self.sparse:
            return ShortlistProduct.apply(x_BD, self.weight, self.bias, clusters_BK, torch.is_grad_enabled())
        logits_BCF = product(x_BD, self.weight, self.bias)
        return logits_BCF.gather(1, clusters_BK[..., None].expand(-1, -1, self.bias.shape[1]))


def choose_layers(depth: int, n_levels: int) -> list[list[int]]:
    """Hidden states per level: the last level reads the last layer, each one above it a sixth of the depth earlier, the
    first two layers at once: for 12 layers 7+8,10,12 or 5+6,8,10,12, as published."""
    at = [max(1, int(depth * (1 - (n_levels - 1 - t) / 6) + 0.5)) for t in range(n_levels)]
    return [[at[0] - 1, at[0]] if n_levels > 1 and at[0] > 1 else [at[0]]] + [[layer] for layer in at[1:]]


class Encoder(nn.Module):
    """Any bidirectional transformer of the transformers library, giving the pooled hidden states of chosen layers.
    Special tokens come from the tokeniser by way of 01_data.py, token types and positions from the model's defaults."""

    def __init__(self, backbone: nn.Module, pooling: str, max_len: int, from_scratch: bool = False) -> None:
        super().__init__()
        self.backbone, self.pooling, self.from_scratch = without_waiting(backbone), pooling, from_scratch
        if pooling not in ("first", "mean"):
            raise UserError(f"--pooling {pooling}: expected 'first' or 'mean'")
        backbone.pooler = None  # BERT's extra layer on the last hidden state, which nothing here reads
        if max_len > positions(backbone):
            raise UserError(f"--max-len {max_len} > {positions(backbone)} positions of the encoder; lower it")

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, layers: set[int]) -> dict[int, Tensor]:
        """{layer: pooled feature (B, D)} of the hidden states asked for; 0 is the embeddings."""
        hidden = self.backbone(input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True).hidden_states
        if self.pooling == "first":
            return {layer: hidden[layer][:, 0] for layer in layers}
        share_B1T = (mask_BT / mask_BT.sum(1, keepdim=True))[:, None]
        return {layer: (share_B1T.to(hidden[layer].dtype) @ hidden[layer]).squeeze(1) for layer in layers}


class Cascade(nn.Module):
    """Encoder, a head per level, and the descent through the tree."""

    def __init__(self, encoder: Encoder, tree: tree_stage.Tree, topk: list[int], layers: list[list[int]],
                 join: str = "map", dropout: list[float] | None = None) -> None:
        super().__init__()
        self.encoder, self.topk, self.layers, self.amp = encoder, topk, layers, "off"
        self.counts = [1, *tree.levels, len(tree.slot_to_label)]  # nodes per level, from the root to the slots
        shape, n_levels = encoder.backbone.config, len(tree.levels) + 1
        width, depth = shape.hidden_size, shape.num_hidden_layers
        if len(layers) != n_levels or any(not 0 <= layer <= depth for group in layers for layer in group):
            raise UserError(f"--layers {layers}: expected {n_levels} groups of hidden states between 0 and {depth}")
        fans = [below // above for above, below in zip(self.counts, self.counts[1:], strict=False)]
        most = [k * fan for k, fan in zip([1, *topk], fans, strict=False)]  # the children of what is kept above
        if len(topk) != len(tree.levels) or any(not 1 <= k <= n for k, n in zip(topk, most, strict=False)):
            raise UserError(f"--topk {topk}: levels {tree.levels} have at most {most[: len(tree.levels)]} candidates")
        # A level that reads several hidden states maps them to one of the encoder's width, as published; or it reads
        # them as they are, and its rows are as wide as all of them together.
        if join not in ("map", "none"):
            raise UserError(f"--join {join}: expected map or none")
        widths = [width if join == "map" else len(group) * width for group in layers]
        self.heads = nn.ModuleList(Head(n, fan, wide, sparse=n == self.counts[-2])
                                   for n, fan, wide in zip(self.counts, fans, widths, strict=False))
        # Hidden states that some level reads. Before a level sees one, it is centred and scaled by one number: stage 4
        # fills these in for a pretrained encoder, where most of a feature is a mean that all documents share.
        self.hidden = sorted(set(sum(layers, [])))
        self.center_HD = nn.Buffer(torch.zeros(len(self.hidden), width))
        self.scale_H = nn.Buffer(torch.ones(len(self.hidden)))
        self.join = nn.ModuleList(nn.Linear(len(group) * width, width) if join == "map" and len(group) > 1
                                  else nn.Identity() for group in layers)
        dropout = dropout or DROPOUT.get(n_levels, (0.3,) * n_levels)
        self.dropout = nn.ModuleList(nn.Dropout(rate) for rate in dropout)
        slots = torch.from_numpy(tree.slot_to_label).long()
        self.slot_to_label = nn.Buffer(slots, persistent=False)
        self.label_to_slot = nn.Buffer(slots.argsort()[(slots < 0).sum() :], persistent=False)  # empty ones sort first
        self.empty = nn.Buffer((slots < 0).view(self.counts[-2], -1), persistent=False)

    def pooled(self, batch: data_stage.Batch, encoder: Encoder | None = None) -> Tensor:
        """(B, H, D): the hidden states that are read, pooled, of the model's encoder or of another.

        Only the encoder computes in the precision `amp`: coarse logits would make ties.
        """
        if batch.pooled_BHD is not None:
            return batch.pooled_BHD
        kind = batch.ids_BT.device.type
        dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.amp]
        with torch.autocast(kind, dtype, enabled=dtype is not None):
            pooled = (encoder or self.encoder)(batch.ids_BT, batch.mask_BT, set(self.hidden))
        return torch.stack([pooled[layer] for layer in self.hidden], dim=1)

    def scaled(self, pooled_BHD: Tensor) -> Tensor:
        """The same, float32, centred, and each hidden state scaled by one number."""
        return (pooled_BHD.to(self.center_HD.dtype) - self.center_HD) * self.scale_H[:, None]

    def features(self, batch: data_stage.Batch, encoder: Encoder | None = None) -> list[Tensor]:
        """(B, D) per level, float32: what the level reads, centred, scaled, and joined where it reads two."""
        x_BHD = self.scaled(self.pooled(batch, encoder))
        features = []
        for group, join in zip(self.layers, self.join, strict=True):
            places = [self.hidden.index(layer) for layer in group]
            features.append(join(torch.cat([x_BHD[:, place] for place in places], dim=1)))
        return features

    def descend(self, features: list[Tensor], batch: data_stage.Batch, teacher: bool) -> Iterator[Level]:
        """Yield the levels, coarse to fine. With `teacher` the positive nodes come first in every shortlist."""
        parents_BK, picked_BK = torch.zeros_like(batch.ids_BT[:, :1]), None  # the root
        for t, head in enumerate(self.heads):
            fan = self.counts[t + 1] // self.counts[t]
            logits_BKF, targets_BKF = head(self.dropout[t](features[t]), parents_BK), None
            if t == len(self.topk):
                logits_BKF = logits_BKF.masked_fill(self.empty[parents_BK], -torch.inf)
            if teacher:
                node_P = self.label_to_slot[batch.label_P] // (self.counts[-1] // self.counts[t + 1])
                targets_BKF = tree_stage.match(node_P, batch.doc_P, parents_BK, fan)
            yield Level(parents_BK, picked_BK, logits_BKF, targets_BKF)
            if t < len(self.topk):
                picked_BK = shortlist(logits_BKF, targets_BKF, self.topk[t])
                parents_BK = tree_stage.expand(parents_BK, fan).gather(1, picked_BK)

    def loss(self, batch: data_stage.Batch) -> tuple[Tensor, Tensor]:
        """(loss per level (levels,), positive nodes beyond the k of their level (), which go no further down).
        Binary cross-entropy, summed over a document's candidates and averaged over the documents."""
        losses, surplus = [], torch.zeros((), device=batch.ids_BT.device)
        for t, level in enumerate(self.descend(self.features(batch), batch, teacher=True)):
            z, y = level.logits_BKF, level.targets_BKF
            # An empty slot has z = -inf: softplus makes its loss and its gradient exactly nothing.
            losses.append((F.softplus(z) - torch.where(y > 0, z, 0.0)).sum() / len(z))
            if t < len(self.topk):
                surplus += (y.sum((1, 2)) - self.topk[t]).clamp(min=0).sum()
        return torch.stack(losses), surplus

    @torch.no_grad()
    def beam(self, batch: data_stage.Batch) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """(labels (B, K), {ranking: log-probability (B, K)}, clusters kept at each cluster level [(B, k)]), where K are
        the candidates of the last level; an empty slot has label -1 and log-probability -inf."""
        kept, scores = [], None
        for level in self.descend(self.features(batch), batch, teacher=False):
            if scores is not None:
                kept.append(level.parents_BK)
                scores = {name: score_BK.gather(1, level.picked_BK) for name, score_BK in scores.items()}
            scores = rank(level.logits_BKF, scores)
        return self.slot_to_label[tree_stage.expand(level.parents_BK, level.logits_BKF.shape[2])], scores, kept

    def predict(self, batch: data_stage.Batch, k: int, ranking: str = "path") -> tuple[Tensor, Tensor]:
        """The k best labels of the beam and their log-probabilities, as best_k gives them."""
        labels_BK, scores, _ = self.beam(batch)
        return best_k(labels_BK, scores[ranking], k)

    def param_groups(self, lr: float, lr_encoder: float) -> list[dict]:
        """Parameters for the optimisers, with the paper's weight decays; none on biases and normalisations. "rows":
        for RowAdam. The word embeddings of an encoder from scratch learn at the rate of the heads."""
        table = self.encoder.backbone.get_input_embeddings().weight if self.encoder.from_scratch else None
        rows = {id(parameter) for head in self.heads if head.sparse for parameter in head.parameters()}
        groups: dict[tuple[float, float, bool], list] = {}
        for name, parameter in self.named_parameters():
            in_encoder = name.startswith("encoder.") and parameter is not table
            decay = 0.0 if parameter.ndim == 1 or name.endswith("bias") else 0.05 if in_encoder else 0.005
            groups.setdefault((lr_encoder if in_encoder else lr, decay, id(parameter) in rows), []).append(parameter)
        return [dict(zip(("lr", "weight_decay", "rows"), key, strict=True), params=groups[key]) for key in groups]


def rates(text: str, n_levels: int) -> list[float] | None:
    """'0.2,0.3,0.4' or, for all levels, '0.2' -> dropout rates; '' -> None, as published."""
    if not text:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    found = found * n_levels if len(found) == 1 else found
    if len(found) != n_levels or not all(0 <= rate < 1 for rate in found):
        raise UserError(f"--dropout {text}: expected one number from 0 to 1, or one for each of {n_levels} levels")
    return found


def build(data: data_stage.Data, tree: tree_stage.Tree, config: Config, backbone=None) -> Cascade:
    """The cascade before training, or around an encoder that is there already."""
    torch.manual_seed(config.seed)
    from_scratch = data.meta["encoder"] == "tiny"
    if backbone is None:
        backbone = (tiny_bert(*int_list(config.tiny, "--tiny", 2), data.meta) if from_scratch
                    else pretrained_encoder(data.meta))
    # In float32 whatever the checkpoint's type: mixed precision is for the computation, not for the weights.
    encoder = Encoder(backbone.float(), config.pooling, config.max_len, from_scratch)
    topk = int_list(config.topk, "--topk") if config.topk else [min(n, 192 << t) for t, n in enumerate(tree.levels)]
    layers = ([int_list(group.replace("+", ","), "--layers") for group in config.layers.split(",")] if config.layers
              else choose_layers(backbone.config.num_hidden_layers, len(tree.levels) + 1))
    model = Cascade(encoder, tree, topk, layers, config.join, rates(config.dropout, len(tree.levels) + 1))
    leaf = model.heads[-1].weight
    leaf.data = leaf.data.bfloat16() if config.label_bf16 else leaf.data
    return model


def run(config: Config) -> None:
    data, tree = data_stage.load(config.run), tree_stage.load(config.run)
    config = settle(config, RECIPES, data.meta["encoder"])
    model = build(data, tree, config).eval()
    batch = data.batch("train", np.arange(4), config.max_len)
    for name, part in (("encoder", model.encoder), ("heads", model.heads)):
        print(f"{name}: {sum(parameter.numel() for parameter in part.parameters()):,} parameters")
    print(f"a batch of 4 documents: ids_BT {tuple(batch.ids_BT.shape)}, {len(batch.doc_P)} (document, label) pairs")
    features = model.features(batch)
    for t, level in enumerate(model.descend(features, batch, teacher=True)):
        print(f"level {t + 1}: hidden states {model.layers[t]} -> feature_BD {tuple(features[t].shape)}; parents_BK "
              f"{tuple(level.parents_BK.shape)} -> logits_BKF {tuple(level.logits_BKF.shape)}: each document scores "
              f"{level.logits_BKF[0].numel():,} of {model.counts[t + 1]:,} nodes, "
              f"{int(level.targets_BKF.sum())} positive")
    print(f"loss per level: {[round(loss, 2) for loss in model.loss(batch)[0].tolist()]}; "
          f"predict(batch, 5): labels and log-probabilities {[tuple(x.shape) for x in model.predict(batch, 5)]}")


if __name__ == "__main__":
    main(run, Config, __doc__)
