"""Stage 3: the cascade, one encoder whose layers decide coarse to fine.

    python 03_model.py                    walk through one batch and print every shape
    python 03_model.py --run runs/mine

Reads    RUN/data.npz, RUN/tree.npz
Writes   nothing; stage 4 trains this model

CascadeXML (Kharbanda, Banerjee, Schultheis and Babbar, NeurIPS 2022; arXiv 2211.00640) reads a
document once, with one transformer. Every level of the label tree is a classification problem of
its own, and reads a layer of its own: the coarse levels early layers, the labels the last one. A
level does not score all of its nodes. It scores the children of the few clusters that looked best
one level up: its shortlist.

An example: eight labels, a tree with levels of 2, 4 and 8 nodes, every node with two children, one
correct label, 5. To keep it short, every label stands in the slot of its own number.

    level 1      0               1          both are scored, one is kept
    level 2    0   1           2   3        the children of what was kept are scored, two are kept
    labels    0 1 2 3         4 5 6 7       the children of what was kept are scored

In training, the shortlist is made with the answer at hand ("teacher forcing"): clusters with a
correct label go first. Label 5 is below cluster 1 of level 1 and below cluster 2 of level 2
(integer divisions by 4 and by 2). So level 1 keeps cluster 1, and level 2 scores clusters 2 and 3.
Cluster 2 is correct. The other place goes to the wrong cluster that looks best. (Here only cluster
3 is left. In a real tree it is chosen among hundreds.) Labels 4 to 7 are scored, and the loss asks
for a yes at 5, and for a no at 4, 6 and 7. These three are hard negatives: wrong labels that are
easily taken for right, because they stand beside the correct one or below a cluster that looks
right.

In prediction, nobody knows the answer. Every level keeps what looks most probable: a beam search.
If level 1 keeps cluster 0, label 5 is lost. The share of correct labels whose clusters were kept is
called the recall of the shortlist, and no ranking of labels can find more than that.

The loss is binary cross-entropy of every scored node, summed over all levels, which are trained
together.

Heads first. A pretrained encoder knows much, and the heads know nothing at the start. In their
first steps they would send noise back to the encoder, and damage what the encoder knows. So stage 4
runs the encoder over the corpus once, keeps the features, and trains the heads alone on them, which
takes minutes. After that it trains everything, end to end (linear probing, then fine-tuning: Kumar
et al., ICLR 2022).

Centring. In a pretrained encoder the features of any two documents are nearly equal, because both
are mostly the same mean vector. So from each hidden state the model subtracts its mean over the
corpus, and divides by one number per hidden state, the standard deviation of all its features
together. (Not one number per feature: some encoders have features that are always zero.)

Left out: ensembles of several trees or encoders, which the paper reports, too.
Shapes   B documents of a batch, T tokens, D width of a feature, H hidden states that are read,
         C clusters of a level; in a head, of the level above, whose children it scores (of the
         first head: 1, the root), F children of each (fan), K of the C kept for a document,
         M = K F candidates, L labels, P (document, label) pairs, S slots: F places for labels in
         every last cluster, some empty
         t counts the levels in the code, from 0, the coarsest; what is printed counts from 1
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from plumbing.cli import flag, int_list, main, natural, positive, settle
from plumbing.encoders import (
    bare_encoder,
    check_own_encoder,
    description_of,
    positions,
    pretrained_encoder,
    usable,
    width_and_depth,
)
from plumbing.errors import UserError
from plumbing.label_level import ShortlistProduct, product, refuse_other_optimizers

data_stage = import_module("01_data")
tree_stage = import_module("02_label_tree")

# Settings that a command leaves open. 'tiny' is the encoder of the demo, trained from scratch in
# minutes on a CPU. 'pretrained' is for every other encoder: the paper's settings where it has any.
RECIPES = {
    "tiny": {
        # What a document is: its first 64 tokens, and the mean of their hidden states.
        "max_len": 64,
        "pooling": "mean",
        "batch_size": 128,
        # Its encoder knows nothing yet, so there is nothing that heads could learn from it first.
        "head_epochs": 0,
        "head_lr": 1e-2,
        # Everything together. Rates ten times higher than for an encoder that could be damaged.
        "epochs": 5,
        "lr": 1e-2,
        "lr_encoder": 1e-3,
    },
    "pretrained": {
        "max_len": 128,
        "pooling": "first",
        "batch_size": 64,
        # First the heads alone, on cached features: an epoch takes seconds to minutes.
        "head_epochs": 10,
        "head_lr": 5e-3,
        # Then everything, ten times more carefully for the encoder than for the heads.
        "epochs": 15,
        "lr": 1e-3,
        "lr_encoder": 1e-4,
    },
}
# Dropout of each level's feature, by the number of levels, as published. Other trees have 0.3.
DROPOUT = {3: (0.3, 0.3, 0.4), 4: (0.2, 0.25, 0.4, 0.5)}
# How labels may be ranked at the end of the beam. Validation chooses one.
#   parent   p(label) p(its cluster)
#   path     the product of the probabilities down the whole path
#   label    p(label) alone
RANKINGS = ("parent", "path", "label")


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/demo", "folder of this run's artifacts")
    seed: int = flag(0, "seed of every random choice", natural)
    max_len: int = flag(
        None, "tokens of a document, special ones included [tiny 64, else 128]", positive
    )
    topk: str = flag(None, "clusters kept per cluster level [192,384,768]", str)
    pooling: str = flag(
        None,
        "a document's feature: 'first' token or 'mean' of all [tiny mean, else what stage 1 found: "
        "first, or mean where the first token does not stand for the document]",
        str,
    )
    layers: str = flag(
        "", "hidden states read per level, such as 5+6,8,10,12 (0: embeddings) [spaced by depth]"
    )
    join: str = flag(
        "map",
        "several hidden states of a level: 'map' to one feature, or 'none': read side by side",
    )
    dropout: str = flag(
        "", "of each level's feature, such as 0.2,0.25,0.4, or one number for all [as published]"
    )
    tiny: str = flag("1,256", "layers and width of the encoder 'tiny'")
    label_bf16: bool = flag(
        False, "hold label weights in bfloat16, rounded stochastically: for millions of labels"
    )


# 1. The encoder: a document becomes one feature per hidden state.


class EncoderProtocol(Protocol):
    """What the cascade asks of an encoder. Any torch module with these five members will do."""

    width: int  # D, of every hidden state
    depth: int  # number of the last hidden state; number 0 are the embeddings
    table: Tensor | None  # word embeddings that learn at the rate of the heads, or None

    def __call__(self, ids_BT: Tensor, mask_BT: Tensor, layers: set[int]) -> dict[int, Tensor]:
        """{hidden state: feature (B, D)} for the hidden states asked for."""

    def description(self) -> dict:
        """Plain values from which `make_encoder` builds the encoder again, without its weights."""


class Encoder(nn.Module):
    """A bidirectional transformer of the transformers library, and the pooling of its tokens.

    Special tokens come from the tokeniser, in stage 1. Token types and positions are the model's
    defaults.
    """

    def __init__(
        self, backbone: nn.Module, pooling: str, max_len: int, from_scratch: bool = False
    ) -> None:
        super().__init__()
        if pooling not in ("first", "mean"):
            raise UserError(f"--pooling {pooling}: expected 'first' or 'mean'")
        # Without what nothing reads: a decoder, or BERT's extra layer on the last hidden state.
        backbone = usable(backbone)
        if max_len > positions(backbone):
            raise UserError(
                f"--max-len {max_len} > {positions(backbone)} positions of the encoder; lower it"
            )
        self.backbone = backbone
        self.pooling = pooling
        self.from_scratch = from_scratch
        self.width, self.depth = width_and_depth(backbone)

    @property
    def table(self) -> Tensor | None:
        """The word embeddings of an encoder from scratch: as untrained as the heads."""
        if not self.from_scratch:
            return None
        return self.backbone.get_input_embeddings().weight

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, layers: set[int]) -> dict[int, Tensor]:
        # One pass gives the hidden states of all layers: (B, T, D) each, 0 being the embeddings.
        output = self.backbone(input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True)
        hidden = output.hidden_states
        # The first token, [CLS] in BERT, can look at all others and stand for the document.
        if self.pooling == "first":
            return {layer: hidden[layer][:, 0] for layer in layers}
        # Or the mean over a document's own tokens: padding has a share of 0.
        share_BT = mask_BT / mask_BT.sum(1, keepdim=True)
        features = {}
        for layer in layers:
            hidden_BTD = hidden[layer]
            # The mean as a product, (1, T) times (T, D) for each document.
            share_B1T = share_BT[:, None].to(hidden_BTD.dtype)
            features[layer] = (share_B1T @ hidden_BTD).squeeze(1)
        return features

    def description(self) -> dict:
        return description_of(self.backbone)


def tiny_bert(depth: int, width: int, meta: dict) -> nn.Module:
    """The demo's encoder: a small BERT, trained from scratch. `meta` is the record of data.npz.

    It has no dropout of its own: every level's feature has its dropout already.
    """
    from transformers import AutoModel, BertConfig

    # Attention heads of width 64, as in BERT, where the width can be divided like that.
    n_heads = math.gcd(width, max(1, width // 64))
    config = BertConfig(
        vocab_size=meta["vocab_size"],
        pad_token_id=meta["pad"],
        type_vocab_size=1,
        num_hidden_layers=depth,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=n_heads,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return AutoModel.from_config(config)


def make_encoder(
    data: data_stage.Data,
    config: Config,
    description: dict | None = None,
    weights: dict | None = None,
) -> Encoder:
    """The encoder of a new model; or, from model.pt's `description` and `weights`, of a trained
    one.

    The weights are not loaded here. Their sizes are used to check the description: a damaged file
    must not make us build an encoder far bigger than its weights. A fork, your own version of this
    project with an encoder of its own, replaces this function (docs/forking.md).
    """
    from_scratch = data.meta["encoder"] == "tiny"
    # From model.pt, or new and random, or pretrained: from a folder or from the hub.
    if description is not None:
        backbone = bare_encoder(description, weights)
    elif from_scratch:
        depth, width = int_list(config.tiny, "--tiny", 2)
        backbone = tiny_bert(depth, width, data.meta)
    else:
        backbone = pretrained_encoder(data.meta)
    # Weights are float32, whatever the checkpoint's type. Mixed precision is for computing only.
    return Encoder(backbone.float(), config.pooling, config.max_len, from_scratch)


def choose_layers(depth: int, n_levels: int) -> list[list[int]]:
    """Which hidden states each level reads, coarse to fine. `depth` is the last hidden state.

    The finest level reads the last layer, and every level above it reads one sixth of the depth
    earlier. The coarsest level reads two neighbouring layers (--join says how). With 12 layers
    these are the published settings: 7+8, 10, 12 for three levels and 5+6, 8, 10, 12 for four.
    """
    layers = []
    lowest = min(1, depth)  # the embeddings, number 0, only if there is nothing else
    for level in range(n_levels):
        # How far above the labels is this level? One sixth of the depth for each level.
        levels_below = n_levels - 1 - level
        layer = int(depth * (1 - levels_below / 6) + 0.5)  # rounded to the nearest layer
        layers.append([max(lowest, layer)])
    # The coarsest level gets the layer before as well.
    coarsest = layers[0][0]
    if n_levels > 1 and coarsest > 1:
        layers[0] = [coarsest - 1, coarsest]
    return layers


# 2. The heads: a feature becomes a logit per node.


def plain_logits(x_BD: Tensor, weight_CFD: Tensor, bias_CF: Tensor, clusters_BK: Tensor) -> Tensor:
    """Logits (B, K, F) of the children of each document's clusters, in the plainest form.

    Every document gathers the weights of its own candidates and multiplies them with its feature.
    This is what a head computes, and how you may read it. It is slow: the gathered weights are
    (B, K, F, D) numbers. `Head` computes the same in two faster ways, and a test compares them.
    """
    # Each document's own copy of the weights of its K clusters, with F children each.
    weight_BKFD = weight_CFD[clusters_BK]
    bias_BKF = bias_CF[clusters_BK]
    # A logit is the dot product of a document's feature with a child's weights, plus its bias.
    return torch.einsum("bd,bkfd->bkf", x_BD, weight_BKFD) + bias_BKF


class Head(nn.Module):
    """A linear classifier for every node of a level: weight (C, F, D) and bias (C, F).

    C counts the clusters of the level above. The F children of a cluster are one contiguous block.

    A cluster level is small. All of its nodes are scored in one product, and then each document
    picks its candidates. `sparse` is for the labels, by far the biggest level: only clusters on the
    shortlists of the batch are read, and only plumbing.label_level.RowAdam can train the weights.
    """

    def __init__(self, n_clusters: int, fan: int, width: int, sparse: bool = False) -> None:
        super().__init__()
        self.sparse = sparse
        # Zeros: at the start no node prefers any document, and only the biases speak.
        self.weight = nn.Parameter(torch.zeros(n_clusters, fan, width))
        # Few nodes are right for a document: a probability of 0.02, until stage 4 sets each bias to
        # the frequency of its node.
        self.bias = nn.Parameter(torch.full((n_clusters, fan), -4.0))
        # From now on torch asks before the step of any optimiser in this process whether such
        # weights are among its parameters, and raises an error if it is not RowAdam.
        if sparse:
            refuse_other_optimizers()

    def forward(self, x_BD: Tensor, clusters_BK: Tensor) -> Tensor:
        """Logits (B, K, F) of the children of each document's clusters."""
        if self.sparse:
            # One product over the clusters that some document of the batch keeps.
            return ShortlistProduct.apply(x_BD, self.weight, self.bias, clusters_BK)
        # One product over all clusters; then each document picks its own.
        logits_BCF = product(x_BD, self.weight, self.bias)
        fan = self.bias.shape[1]
        index_BKF = clusters_BK[..., None].expand(-1, -1, fan)
        return logits_BCF.gather(1, index_BKF)


# 3. The shortlist and the rankings.


class Level(NamedTuple):
    """One level of one batch. Its candidates are the F children of each of K parents."""

    parents_BK: Tensor  # int64, the clusters kept one level up; for the first level the root, 0
    # Where each parent stood among the candidates one level up: prediction looks its score up
    # there. None for the first level.
    picked_BK: Tensor | None
    logits_BKF: Tensor  # float32; -inf in an empty slot
    # float32, 1 where a correct label is below the node. In training only.
    targets_BKF: Tensor | None


def shortlist(logits_BKF: Tensor, targets_BKF: Tensor | None, k: int) -> Tensor:
    """Which clusters go on? Places (B, k) of the best candidates among the K * F."""
    if targets_BKF is None:
        # In prediction: the most probable ones.
        score_BKF = logits_BKF.detach()
    else:
        # In training every cluster with a correct label goes first: its probability, at most 1, is
        # raised by 1. The places left go to clusters that look right and are wrong. Their children
        # are the hard negatives of the next level.
        score_BKF = logits_BKF.detach().sigmoid() + targets_BKF
    kept = score_BKF.flatten(1).topk(k, dim=1, sorted=False)
    return kept.indices


def rank(logits_BKF: Tensor, above: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """{ranking: log-probability (B, K * F)} of the candidates of a level.

    `above` holds the same for their K parents, (B, K); None at the first level.
    """
    # The logarithm of a probability. A product of probabilities is a sum of logarithms.
    own_BKF = functional.logsigmoid(logits_BKF)
    if above is None:
        scores = {"label": own_BKF, "parent": own_BKF, "path": own_BKF}
    else:
        scores = {
            "label": own_BKF,
            "parent": own_BKF + above["label"][..., None],
            "path": own_BKF + above["path"][..., None],
        }
    return {name: score_BKF.flatten(1) for name, score_BKF in scores.items()}


def best_k(labels_BM: Tensor, scores_BM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of M scored labels, best first: (labels (B, k), scores (B, k)).

    Where there are fewer than k, the rest is label -1 with score -inf.
    """
    # Append k candidates that are worse than all others: topk then always finds k.
    scores_BM = functional.pad(scores_BM, (0, k), value=-torch.inf)
    labels_BM = functional.pad(labels_BM, (0, k), value=-1)
    best = scores_BM.topk(k, dim=1)
    return labels_BM.gather(1, best.indices), best.values


# 4. The cascade: encoder, heads, and the descent through the tree.


class Cascade(nn.Module):
    """One encoder, one head per level, and the descent through the label tree.

    A fork replaces one method: `shortlist` for other negatives, `level_loss` for another loss.
    """

    def __init__(
        self,
        encoder: EncoderProtocol,
        tree: tree_stage.Tree,
        topk: list[int],
        layers: list[list[int]],
        join: str = "map",
        dropout: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.topk = topk  # clusters kept, per cluster level
        self.layers = layers  # hidden states that each level reads
        self.amp = "off"  # precision of the encoder; stage 4 chooses it
        # Nodes per level, from the root to the slots: with 8 labels [1, 2, 4, 8].
        self.counts = [1, *tree.levels, len(tree.slot_to_label)]
        self.check(join)
        n_levels = len(layers)

        # A head per level. The last one, for the labels, is sparse. A level that reads several
        # hidden states maps them to one feature, as published ("map"). Or it reads them as they
        # are, and its weights are as wide as all of them together ("none").
        self.heads = nn.ModuleList()
        for t, group in enumerate(layers):
            width = encoder.width if join == "map" else len(group) * encoder.width
            fan = self.counts[t + 1] // self.counts[t]
            is_last = t == n_levels - 1
            self.heads.append(Head(self.counts[t], fan, width, sparse=is_last))
        self.join = nn.ModuleList()
        for group in layers:
            if join == "map" and len(group) > 1:
                self.join.append(nn.Linear(len(group) * encoder.width, encoder.width))
            else:
                self.join.append(nn.Identity())
        # Every level's feature has a dropout of its own.
        rates = dropout or DROPOUT.get(n_levels, (0.3,) * n_levels)
        self.dropout = nn.ModuleList(nn.Dropout(rate) for rate in rates)

        # Before a level sees a hidden state, the state is centred and scaled by one number. Stage 4
        # computes both when the heads learn first. Otherwise they change nothing.
        self.hidden = sorted({layer for group in layers for layer in group})
        self.center_HD = nn.Buffer(torch.zeros(len(self.hidden), encoder.width))
        self.scale_H = nn.Buffer(torch.ones(len(self.hidden)))

        # The tree, as a permutation: which label stands in a slot (-1: none), and its inverse.
        slot_to_label_S = torch.from_numpy(tree.slot_to_label).long()
        n_empty = (slot_to_label_S < 0).sum()
        label_to_slot_L = slot_to_label_S.argsort()[n_empty:]  # empty slots, -1, are sorted first
        self.slot_to_label = nn.Buffer(slot_to_label_S, persistent=False)
        self.label_to_slot = nn.Buffer(label_to_slot_L, persistent=False)
        empty_CF = (slot_to_label_S < 0).view(self.counts[-2], -1)
        self.empty = nn.Buffer(empty_CF, persistent=False)

    def check(self, join: str) -> None:
        """UserError unless tree, --topk, --layers and --join fit together."""
        if join not in ("map", "none"):
            raise UserError(f"--join {join}: expected map or none")
        n_levels = len(self.counts) - 1
        depth = self.encoder.depth
        in_range = all(0 <= layer <= depth for group in self.layers for layer in group)
        if len(self.layers) != n_levels or not in_range:
            raise UserError(
                f"--layers {self.layers}: expected {n_levels} groups of hidden states "
                f"between 0 and {depth}"
            )
        # A level cannot keep more clusters than it scores: the children of the clusters kept above.
        levels = self.counts[1:-1]
        most = []  # candidates per cluster level
        parents = 1
        for t, k in enumerate(self.topk[: len(levels)]):
            most.append(parents * (self.counts[t + 1] // self.counts[t]))
            parents = k
        fits = all(1 <= k <= n for k, n in zip(self.topk, most, strict=False))
        if len(self.topk) != len(levels) or not fits:
            raise UserError(f"--topk {self.topk}: levels {levels} have at most {most} candidates")

    def pooled(self, batch: data_stage.Batch, encoder: EncoderProtocol | None = None) -> Tensor:
        """(B, H, D): the pooled hidden states, of the model's encoder or of another one.

        Another one: variants/xr_transformer.py trains its levels one after the other, and copies
        the encoder before each.
        """
        if batch.pooled_BHD is not None:
            return batch.pooled_BHD  # stage 4 computed them before: the heads learn first
        encoder = encoder or self.encoder
        # Only the encoder computes in the precision `amp`. Logits of clusters in bf16 would be
        # rounded so much that many were equal, and the choice among them arbitrary. (With
        # --label-bf16 those of labels are, on a CPU. There nothing is chosen by them in training,
        # and in prediction labels with equal scores come in any order.)
        dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.amp]
        kind = batch.ids_BT.device.type
        with torch.autocast(kind, dtype, enabled=dtype is not None):
            features = encoder(batch.ids_BT, batch.mask_BT, set(self.hidden))
        return torch.stack([features[layer] for layer in self.hidden], dim=1)

    def scaled(self, pooled_BHD: Tensor) -> Tensor:
        """The same, float32, centred, and each hidden state scaled by one number."""
        pooled_BHD = pooled_BHD.to(self.center_HD.dtype)
        return (pooled_BHD - self.center_HD) * self.scale_H[:, None]

    def features(
        self, batch: data_stage.Batch, encoder: EncoderProtocol | None = None
    ) -> list[Tensor]:
        """What each level reads: a feature (B, D) per level, float32."""
        x_BHD = self.scaled(self.pooled(batch, encoder))  # all hidden states that any level reads
        features = []
        for group, join in zip(self.layers, self.join, strict=True):
            # Pick the level's own hidden states, and make one feature of them.
            places = [self.hidden.index(layer) for layer in group]
            side_by_side = torch.cat([x_BHD[:, place] for place in places], dim=1)
            features.append(join(side_by_side))
        return features

    def nodes(self, label_P: Tensor, t: int) -> Tensor:
        """The node of level t above each label: a division of its slot.

        t counts from 0: t = 0 is what texts and printed lines call level 1. t = -1 is the root.
        """
        slot_P = self.label_to_slot[label_P]
        slots_per_node = self.counts[-1] // self.counts[t + 1]
        return slot_P // slots_per_node

    def shortlist(
        self, t: int, logits_BKF: Tensor, targets_BKF: Tensor | None, batch: data_stage.Batch
    ) -> Tensor:
        """Which clusters level t keeps: places (B, topk[t]) among its K * F candidates, int64.

        Level 0 is the coarsest. The places of a document differ from each other; their order does
        not matter. There are no targets in prediction.
        """
        return shortlist(logits_BKF, targets_BKF, self.topk[t])

    def descend(
        self, features: list[Tensor], batch: data_stage.Batch, teacher: bool
    ) -> Iterator[Level]:
        """Yield the levels, coarse to fine. With `teacher`, correct clusters come first."""
        parents_BK = torch.zeros_like(batch.ids_BT[:, :1])  # everything begins at the root, node 0
        picked_BK = None
        last = len(self.heads) - 1
        for t, head in enumerate(self.heads):
            fan = self.counts[t + 1] // self.counts[t]
            # 1. Score the children of the clusters kept one level up.
            x_BD = self.dropout[t](features[t])
            logits_BKF = head(x_BD, parents_BK)
            if t == last:
                logits_BKF = logits_BKF.masked_fill(self.empty[parents_BK], -torch.inf)
            # 2. In training: which of them have a correct label below?
            targets_BKF = None
            if teacher:
                node_P = self.nodes(batch.label_P, t)
                targets_BKF = tree_stage.match(node_P, batch.doc_P, parents_BK, fan)
            yield Level(parents_BK, picked_BK, logits_BKF, targets_BKF)
            # 3. Keep the best. They are the parents of the next level.
            if t < last:
                picked_BK = self.shortlist(t, logits_BKF, targets_BKF, batch)
                candidates_BM = tree_stage.expand(parents_BK, fan)
                parents_BK = candidates_BM.gather(1, picked_BK)

    def level_loss(self, logits_BKF: Tensor, targets_BKF: Tensor) -> Tensor:
        """Binary cross-entropy, summed over a document's candidates, averaged over the documents.

        For a logit z and a target y in {0, 1} it is softplus(z) - y z, which is
        -log sigmoid(z) for y = 1 and -log(1 - sigmoid(z)) for y = 0.
        An empty slot has z = -inf: softplus makes its loss and its gradient exactly 0.
        Every level has this loss, clusters and labels.
        """
        correct_BKF = torch.where(targets_BKF > 0, logits_BKF, 0.0)
        return (functional.softplus(logits_BKF) - correct_BKF).sum() / len(logits_BKF)

    def loss(self, batch: data_stage.Batch) -> tuple[Tensor, Tensor]:
        """Two tensors: the loss of each level (levels,), which stage 4 adds up, and the surplus ().

        Surplus: how many correct nodes found no place in a shortlist, because a document has more
        of them than the k that its level keeps. Their children are not scored, so the labels below
        them are not trained in this step.
        """
        losses = []
        surplus = torch.zeros((), device=batch.ids_BT.device)
        # The encoder runs once; all levels read its hidden states.
        features = self.features(batch)
        for t, level in enumerate(self.descend(features, batch, teacher=True)):
            losses.append(self.level_loss(level.logits_BKF, level.targets_BKF))
            # Of a document's correct nodes, how many are more than the level keeps?
            if t < len(self.topk):
                correct_B = level.targets_BKF.sum((1, 2))
                surplus += (correct_B - self.topk[t]).clamp(min=0).sum()
        return torch.stack(losses), surplus

    @torch.no_grad()
    def beam(self, batch: data_stage.Batch) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """Search without a teacher, and score every label that is reached, M = K * F of them.

        (labels (B, M), {ranking: log-probability (B, M)}, clusters kept at each cluster level
        [(B, K)]). An empty slot has label -1 and log-probability -inf.
        """
        kept = []
        scores = None
        features = self.features(batch)
        for level in self.descend(features, batch, teacher=False):
            if scores is not None:
                kept.append(level.parents_BK)
                # From the scores of all candidates one level up to the scores of those kept.
                scores = {name: score.gather(1, level.picked_BK) for name, score in scores.items()}
            scores = rank(level.logits_BKF, scores)
        # The candidates of the last level are slots; a table says which label stands in each.
        fan = level.logits_BKF.shape[2]
        slots_BM = tree_stage.expand(level.parents_BK, fan)
        return self.slot_to_label[slots_BM], scores, kept

    def predict(
        self, batch: data_stage.Batch, k: int, ranking: str = "path"
    ) -> tuple[Tensor, Tensor]:
        """The k best labels of the beam and their log-probabilities, as best_k gives them."""
        labels_BM, scores, _ = self.beam(batch)
        return best_k(labels_BM, scores[ranking], k)

    def param_groups(self, lr: float, lr_encoder: float) -> list[dict]:
        """Parameters for the optimisers, with the paper's weight decay and two learning rates.

        "rows" marks the groups that RowAdam trains: the weights of the labels. They do not decay.
        """
        # Which parameters belong to a sparse head?
        rows = set()
        for head in self.heads:
            if head.sparse:
                rows.update(id(parameter) for parameter in head.parameters())
        # Parameters with the same rate, decay and optimiser make a group.
        groups: dict[tuple[float, float, bool], list] = {}
        for name, parameter in self.named_parameters():
            # Word embeddings from scratch are as new as the heads, and learn at their rate.
            in_encoder = name.startswith("encoder.") and parameter is not self.encoder.table
            is_row = id(parameter) in rows
            if is_row or parameter.ndim == 1 or name.endswith("bias"):
                decay = 0.0  # labels, biases and normalisations
            else:
                decay = 0.05 if in_encoder else 0.005
            rate = lr_encoder if in_encoder else lr
            key = (rate, decay, is_row)
            groups.setdefault(key, []).append(parameter)
        return [
            {"params": parameters, "lr": rate, "weight_decay": decay, "rows": is_rows}
            for (rate, decay, is_rows), parameters in groups.items()
        ]


# 5. From the command line to a model.


def rates(text: str, n_levels: int) -> list[float] | None:
    """'0.2,0.3,0.4', or '0.2' for all levels, as dropout rates. None for '': as published."""
    if not text:
        return None
    # What is no number is refused below, as too few or too many numbers are.
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) == 1:
        found = found * n_levels
    if len(found) != n_levels or not all(0 <= rate < 1 for rate in found):
        raise UserError(
            f"--dropout {text}: expected one number from 0 to 1, "
            f"or one for each of {n_levels} levels"
        )
    return found


def build(
    data: data_stage.Data,
    tree: tree_stage.Tree,
    config: Config,
    encoder: EncoderProtocol | None = None,
    cascade: type[Cascade] = Cascade,
) -> Cascade:
    """The cascade before training, or around an encoder that is there already.

    `cascade`: a class of a fork, with a loss or negatives of its own.
    """
    torch.manual_seed(config.seed)
    # The encoder, new or given.
    is_new = encoder is None
    if is_new:
        encoder = make_encoder(data, config)
    # The size of the shortlists.
    if config.topk:
        topk = int_list(config.topk, "--topk")
    else:
        # 192 clusters, and twice as many at each finer level.
        topk = [min(n, 192 * 2**t) for t, n in enumerate(tree.levels)]
    # Which hidden states each level reads.
    n_levels = len(tree.levels) + 1
    if config.layers:
        groups = config.layers.split(",")
        layers = [int_list(group.replace("+", ","), "--layers") for group in groups]
    else:
        layers = choose_layers(encoder.depth, n_levels)
    # An encoder of a fork shows its mistakes now, and not after a long training.
    if is_new and not isinstance(encoder, Encoder):
        make_again = partial(make_encoder, data, config)
        check_own_encoder(encoder, set().union(*layers), make_again)
    dropout = rates(config.dropout, n_levels)
    model = cascade(encoder, tree, topk, layers, config.join, dropout)
    # Half the memory for the label weights, by far the biggest part with millions of labels.
    if config.label_bf16:
        label_weight = model.heads[-1].weight
        label_weight.data = label_weight.data.bfloat16()
    return model


def run(config: Config) -> None:
    """Walk through one batch of at most four documents and print every shape."""
    # 1. What the stages before have made. What the command does not set, the recipe does.
    data = data_stage.load(config.run)
    tree = tree_stage.load(config.run)
    config = settle(config, RECIPES, data.meta)
    # 2. The model, untrained.
    model = build(data, tree, config).eval()
    for name, part in (("encoder", model.encoder), ("heads", model.heads)):
        n_parameters = sum(parameter.numel() for parameter in part.parameters())
        print(f"{name}: {n_parameters:,} parameters")

    n_slots = len(tree.slot_to_label)
    n_empty = n_slots - len(data.names)
    print(
        f"tree: clusters per level {tree.levels}, of which {model.topk} are kept; "
        f"{n_slots:,} slots, {n_empty:,} of them empty"
    )

    # 3. Four documents go down the tree, with the teacher.
    n_documents = min(4, len(data.splits["train"]))  # a corpus may have fewer
    batch = data.batch("train", np.arange(n_documents), config.max_len)
    ids_shape = tuple(batch.ids_BT.shape)
    print(
        f"a batch of {n_documents} documents: ids_BT {ids_shape}, "
        f"{len(batch.doc_P)} (document, label) pairs"
    )
    features = model.features(batch)
    for t, level in enumerate(model.descend(features, batch, teacher=True)):
        n_scored = level.logits_BKF[0].numel()
        n_correct = int(level.targets_BKF.sum())
        print(
            f"level {t + 1}: hidden states {model.layers[t]} -> "
            f"feature_BD {tuple(features[t].shape)}; "
            f"parents_BK {tuple(level.parents_BK.shape)} -> "
            f"logits_BKF {tuple(level.logits_BKF.shape)}: each document scores "
            f"{n_scored:,} of {model.counts[t + 1]:,} nodes, {n_correct} positive"
        )
    # 4. What training and prediction ask of the model.
    losses, _ = model.loss(batch)
    labels, scores = model.predict(batch, 5)
    rounded = [round(loss, 2) for loss in losses.tolist()]
    print(
        f"loss per level: {rounded}; predict(batch, 5): labels and log-probabilities "
        f"{[tuple(labels.shape), tuple(scores.shape)]}"
    )


if __name__ == "__main__":
    main(run, Config, __doc__)
