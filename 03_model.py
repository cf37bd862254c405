"""Stage 3: the cascade, one encoder whose layers decide coarse to fine. Run by itself it prints a walk through one batch.

    python 03_model.py
    python 03_model.py --run runs/mine --topk 64,64

Reads    RUN/data.npz, RUN/tree.npz
Writes   nothing; stage 4 trains this model

After Kharbanda, Banerjee, Schultheis and Babbar, CascadeXML (NeurIPS 2022). Every resolution of the label tree reads its
own layer of one transformer. The candidates at a resolution are the children of the best nodes of the one above; in
training the nodes with a positive label below them are always among the best, and the rest, which scored high and are
wrong, are the hard negatives. The loss is binary cross-entropy over the candidates, summed over the resolutions.

Left out here: the authors' ensembles, sharing a batch between devices, one-vs-all without a tree.

Shapes   B batch, T tokens, D width, C clusters of a level, F children of each (fan), K clusters kept, P positive pairs,
         S slots (labels in tree order)
"""

import os
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Iterator, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, PreTrainedConfig, PreTrainedModel

from artifacts import UserError, flag, int_list, main

data_stage = import_module("01_data")
tree_stage = import_module("02_label_tree")

RANKINGS = ("label", "parent", "path")  # p(label); p(label) p(its cluster); the product down the whole path


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/demo", "folder of this run's artifacts")
    max_len: int = flag(None, "tokens of a document, special ones included [tiny 64, else 128]", int)
    topk: str = flag(None, "clusters kept per cluster level [64,128,256]", str)
    pooling: str = flag(None, "a document's feature: 'first' token or 'mean' of all [tiny mean, else first]", str)
    layers: str = flag("", "hidden states read per level, such as 5+6,8,10,12 (0: embeddings) [spaced by depth]")
    tiny: str = flag("3,256", "layers and width of the encoder 'tiny'")
    seed: int = flag(0, "seed of every random choice")


class Level(NamedTuple):
    """One resolution of one batch: the candidates are the F children of each of the K clusters kept above."""

    parents_BK: Tensor  # int64, nodes of the level above (the root: zeros (B, 1))
    picked_BK: Tensor | None  # int64, where they stood among the candidates of the level above; None at the first level
    logits_BKF: Tensor  # float32, -inf in an empty slot
    targets_BKF: Tensor | None  # float32, 1 where a label below the node is positive; None without a teacher


# ---- free pieces --------------------------------------------------------------------------------------------------


def expand(parents_BK: Tensor, fan: int) -> Tensor:
    """Children (B, K * fan) of nodes (B, K): the tree is a permutation, so no table is needed."""
    return (parents_BK[..., None] * fan + torch.arange(fan, device=parents_BK.device)).flatten(1)


def match(node_P: Tensor, doc_P: Tensor, parents_BK: Tensor, n_parents: int, fan: int) -> Tensor:
    """Targets (B, K, fan): 1 where the candidate is one of the document's positive nodes `node_P` of this level."""
    B, K = parents_BK.shape
    # Where does each cluster stand in the shortlist? Column K, cut off below, takes those that are not in it.
    place = torch.full((B, n_parents), K, dtype=torch.int64, device=parents_BK.device)
    place.scatter_(1, parents_BK, torch.arange(K, device=parents_BK.device).expand(B, K))
    targets = torch.zeros(B, (K + 1) * fan, device=parents_BK.device)
    targets[doc_P, place[doc_P, node_P // fan] * fan + node_P % fan] = 1.0
    return targets[:, : K * fan].view(B, K, fan)


def shortlist(logits_BKF: Tensor, targets_BKF: Tensor | None, k: int) -> Tensor:
    """Places (B, k) of the k best candidates among the K * F, ranked by sigmoid(logit) + [is positive]."""
    score = logits_BKF.detach().sigmoid()
    if targets_BKF is not None:
        score = score + targets_BKF
    return score.flatten(1).topk(k, dim=1, sorted=False).indices


class Head(nn.Module):
    """A linear classifier per node, stored cluster by cluster: the children of one node are one contiguous block."""

    def __init__(self, n_clusters: int, fan: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_clusters, fan, width))
        self.bias = nn.Parameter(torch.full((n_clusters, fan), -4.0))  # few nodes are positive: start with p = 0.02

    def block(self, x_BD: Tensor, start: int, stop: int) -> Tensor:
        """Logits (B, stop - start, F) of the children of a range of clusters, in float32."""
        weight, bias = self.weight[start:stop], self.bias[start:stop]
        return F.linear(x_BD, weight.flatten(0, 1)).float().view(len(x_BD), *bias.shape) + bias

    def forward(self, x_BD: Tensor, clusters_BK: Tensor | None = None) -> Tensor:
        """Logits (B, K, F) of the children of the clusters given, or (B, C, F) of all nodes, in float32."""
        C, fan = self.bias.shape
        if clusters_BK is None:
            return self.block(x_BD, 0, C)
        # A product with the whole table reads C blocks, a gather reads B * K: take the smaller. Same numbers.
        if clusters_BK.numel() >= C:
            return self.block(x_BD, 0, C).gather(1, clusters_BK[..., None].expand(-1, -1, fan))
        return torch.einsum("bd,bkfd->bkf", x_BD, self.weight[clusters_BK]).float() + self.bias[clusters_BK]


# ---- the encoder --------------------------------------------------------------------------------------------------


def choose_layers(depth: int, n_levels: int) -> list[list[int]]:
    """Hidden states per level: the last level reads the last layer, each one above a sixth of the depth earlier, and the
    first level two layers next to each other. For 12 layers this is 7+8,10,12 or 5+6,8,10,12, as published."""
    at = [max(1, int(depth * (1 - (n_levels - 1 - t) / 6) + 0.5)) for t in range(n_levels)]
    return [[at[0] - 1, at[0]] if n_levels > 1 and at[0] > 1 else [at[0]]] + [[layer] for layer in at[1:]]


def tiny_config(data: "data_stage.Data", config: Config) -> PreTrainedConfig:
    """A small BERT for training from scratch."""
    depth, width = int_list(config.tiny, "--tiny")
    return BertConfig(vocab_size=data.meta["vocab_size"], hidden_size=width, num_hidden_layers=depth,
                      num_attention_heads=max(1, width // 64), intermediate_size=2 * width, type_vocab_size=1,
                      hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=data.meta["pad"])  # fmt: skip


class Encoder(nn.Module):
    """Any bidirectional transformer of the transformers library, giving the pooled hidden states of chosen layers.

    What differs between families is settled elsewhere: special tokens come from the tokeniser by way of 01_data.py;
    token types, where they exist, default to zero; positions are counted by the model from the mask or the padding id.
    """

    def __init__(self, backbone: PreTrainedModel, pooling: str) -> None:
        super().__init__()
        self.backbone, self.pooling = backbone, pooling
        if pooling not in ("first", "mean"):
            raise UserError(f"--pooling {pooling}: expected 'first' or 'mean'")
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None  # BERT's extra layer on the last hidden state, which nothing here reads

    def max_len(self) -> int:
        """Most tokens that the position table holds; RoBERTa and MPNet start to count behind their padding id."""
        most = getattr(self.backbone.config, "max_position_embeddings", None) or 1 << 30
        table = getattr(getattr(self.backbone, "embeddings", None), "position_embeddings", None)
        first = getattr(table, "padding_idx", None)
        return most if first is None else most - first - 1

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, layers: set[int]) -> dict[int, Tensor]:
        """{layer: pooled feature (B, D)} of the hidden states asked for; 0 is the embeddings."""
        hidden = self.backbone(input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True).hidden_states
        if self.pooling == "first":
            return {layer: hidden[layer][:, 0] for layer in layers}
        share_B1T = (mask_BT / mask_BT.sum(1, keepdim=True))[:, None].to(hidden[0].dtype)
        return {layer: (share_B1T.to(hidden[layer].dtype) @ hidden[layer]).squeeze(1) for layer in layers}


# ---- the cascade --------------------------------------------------------------------------------------------------


class Cascade(nn.Module):
    """Encoder, a head per level, and the descent through the tree."""

    def __init__(self, encoder: Encoder, tree: "tree_stage.Tree", topk: list[int], layers: list[list[int]]) -> None:
        super().__init__()
        self.encoder, self.topk, self.layers = encoder, topk, layers
        self.counts = [1, *tree.levels, len(tree.slot_to_label)]  # nodes per level, from the root to the slots
        config = encoder.backbone.config
        n_levels, depth, width = len(self.counts) - 1, config.num_hidden_layers, config.hidden_size
        if len(layers) != n_levels or any(not 0 <= layer <= depth for group in layers for layer in group):
            raise UserError(f"--layers {layers}: expected {n_levels} groups of hidden states between 0 and {depth}")
        if len(topk) != len(tree.levels):
            raise UserError(f"--topk {topk}: expected {len(tree.levels)} numbers, one per cluster level {tree.levels}")
        for t, k in enumerate(topk):
            candidates = (topk[t - 1] if t else 1) * (self.counts[t + 1] // self.counts[t])
            if not 1 <= k <= candidates:
                raise UserError(f"k={k}, but level {t + 1} has {candidates} candidates; change --topk {topk}")
        self.heads = nn.ModuleList(
            Head(above, below // above, width) for above, below in zip(self.counts, self.counts[1:], strict=False)
        )
        self.join = nn.ModuleList(
            nn.Identity() if len(group) == 1 else nn.Linear(len(group) * width, width) for group in layers
        )
        rates = {3: (0.3, 0.3, 0.4), 4: (0.2, 0.25, 0.4, 0.5)}.get(n_levels, (0.3,) * n_levels)  # as published
        self.dropout = nn.ModuleList(nn.Dropout(rate) for rate in rates)
        slot_to_label = torch.from_numpy(tree.slot_to_label).long()
        self.register_buffer("slot_to_label", slot_to_label, persistent=False)
        label_to_slot = slot_to_label.argsort()[(slot_to_label < 0).sum() :]  # the empty slots, -1, sort to the front
        self.register_buffer("label_to_slot", label_to_slot, persistent=False)
        self.register_buffer("empty", (slot_to_label < 0).view(tree.levels[-1], -1), persistent=False)

    def features(self, batch: "data_stage.Batch") -> list[Tensor]:
        """One (B, D) per level."""
        pooled = self.encoder(batch.ids_BT, batch.mask_BT, {layer for group in self.layers for layer in group})
        return [join(torch.cat([pooled[layer] for layer in group], dim=1))
                for group, join in zip(self.layers, self.join, strict=True)]  # fmt: skip

    def descend(self, features: list[Tensor], batch: "data_stage.Batch", teacher: bool) -> Iterator[Level]:
        """Yield the levels, coarse to fine. With `teacher` the positive nodes come first in every shortlist."""
        parents_BK, picked_BK = torch.zeros(len(batch.ids_BT), 1, dtype=torch.int64, device=batch.ids_BT.device), None
        for t, head in enumerate(self.heads):
            fan = self.counts[t + 1] // self.counts[t]
            logits_BKF, targets_BKF = head(self.dropout[t](features[t]), parents_BK), None
            if t == len(self.topk):
                logits_BKF = logits_BKF.masked_fill(self.empty[parents_BK], -torch.inf)
            if teacher:
                node_P = self.label_to_slot[batch.label_P] // (self.counts[-1] // self.counts[t + 1])
                targets_BKF = match(node_P, batch.doc_P, parents_BK, self.counts[t], fan)
            yield Level(parents_BK, picked_BK, logits_BKF, targets_BKF)
            if t < len(self.topk):
                picked_BK = shortlist(logits_BKF, targets_BKF, self.topk[t])
                parents_BK = expand(parents_BK, fan).gather(1, picked_BK)

    def loss(self, batch: "data_stage.Batch") -> tuple[Tensor, Tensor]:
        """(loss per level (levels,), positive nodes beyond the k of their level (), which go without training).

        Binary cross-entropy, summed over a document's candidates and averaged over the documents.
        """
        losses, surplus = [], torch.zeros((), device=batch.ids_BT.device)
        for t, level in enumerate(self.descend(self.features(batch), batch, teacher=True)):
            z, y = level.logits_BKF, level.targets_BKF
            # An empty slot has z = -inf: softplus makes its loss and its gradient exactly nothing.
            losses.append((F.softplus(z) - torch.where(y > 0, z, 0.0)).sum() / len(z))
            if t < len(self.topk):
                surplus += (y.sum((1, 2)) - self.topk[t]).clamp(min=0).sum()
        return torch.stack(losses), surplus

    @torch.no_grad()
    def beam(self, batch: "data_stage.Batch") -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """(labels (B, K), {ranking: log-probability (B, K)}, clusters kept at each cluster level [(B, k)]).

        K candidates of the last level; an empty slot has label -1 and log-probability -inf.
        """
        kept, above, path = [], torch.zeros((), device=batch.ids_BT.device), None
        for level in self.descend(self.features(batch), batch, teacher=False):
            own = F.logsigmoid(level.logits_BKF)
            if level.picked_BK is not None:
                kept.append(level.parents_BK)
                above, path = (score.gather(1, level.picked_BK)[..., None] for score in (label, path))
            parent, path = (own + above).flatten(1), (own + (above if path is None else path)).flatten(1)
            label = own.flatten(1)
        slots = expand(level.parents_BK, own.shape[2])
        return self.slot_to_label[slots], {"label": label, "parent": parent, "path": path}, kept

    @torch.no_grad()
    def predict(self, batch: "data_stage.Batch", k: int, ranking: str = "path") -> tuple[Tensor, Tensor]:
        """(labels (B, k) int64, probabilities (B, k) descending), -1 and 0 where the beam holds fewer labels."""
        labels, scores, _ = self.beam(batch)
        return best_k(labels, scores[ranking], k)

    @torch.no_grad()
    def predict_exact(self, batch: "data_stage.Batch", k: int, ranking: str = "path", chunk: int = 4096) -> tuple[Tensor, Tensor]:
        """As predict, but every label is scored, `chunk` leaf clusters at a time with a running top k."""
        features = self.features(batch)
        path = above = torch.zeros(len(batch.ids_BT), 1, device=batch.ids_BT.device)
        for head, x in zip(self.heads[:-1], features, strict=False):
            above = F.logsigmoid(head(x))
            path, above = (path[..., None] + above).flatten(1), above.flatten(1)
        prior = {"label": torch.zeros_like(path), "parent": above, "path": path}[ranking]
        best = best_k(*(torch.empty(len(path), 0, device=path.device, dtype=d) for d in (torch.int64, path.dtype)), k)
        for start in range(0, self.counts[-2], chunk):
            stop = min(start + chunk, self.counts[-2])
            score = F.logsigmoid(self.heads[-1].block(features[-1], start, stop)) + prior[:, start:stop, None]
            labels = self.slot_to_label.view(self.counts[-2], -1)[start:stop].flatten().expand(len(score), -1)
            score = score.flatten(1).masked_fill(labels < 0, -torch.inf)
            best = best_k(torch.cat([best[0], labels], 1), torch.cat([best[1].log(), score], 1), k)
        return best

    def param_groups(self, lr: float, lr_encoder: float) -> list[dict]:
        """Parameters for the optimiser, with the paper's weight decays; none on biases and normalisations."""
        groups = []
        for prefix, rate, decay in (("encoder.", lr_encoder, 0.05), ("", lr, 0.005)):
            named = [(n, p) for n, p in self.named_parameters() if n.startswith("encoder.") == bool(prefix)]
            groups.append({"params": [p for n, p in named if not n.endswith("bias") and "norm" not in n.lower()], "lr": rate, "weight_decay": decay})
            groups.append({"params": [p for n, p in named if n.endswith("bias") or "norm" in n.lower()], "lr": rate, "weight_decay": 0.0})
        return groups


def best_k(labels: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of scored labels (B, K) as (labels (B, k), probabilities (B, k)), descending, filled with -1 and 0."""
    best = scores.topk(min(k, scores.shape[1]), dim=1)
    probability, missing = best.values.exp(), (0, k - best.values.shape[1])
    labels = labels.gather(1, best.indices).masked_fill(probability == 0, -1)
    return F.pad(labels, missing, value=-1), F.pad(probability, missing)


# ---- building -----------------------------------------------------------------------------------------------------


def settle(config: Config, encoder: str, recipes: dict[str, dict]) -> Config:
    """The settings with those left open taken from the encoder's recipe."""
    recipe = recipes["tiny" if encoder == "tiny" else "pretrained"]
    return replace(config, **{key: value for key, value in recipe.items() if getattr(config, key) is None})


RECIPES = {
    "tiny": {"max_len": 64, "pooling": "mean"},
    "pretrained": {"max_len": 128, "pooling": "first"},
}


def build(data: "data_stage.Data", tree: "tree_stage.Tree", config: Config, backbone: PreTrainedModel | None = None) -> Cascade:
    """The untrained cascade, or with `backbone` around an encoder that is there already."""
    torch.manual_seed(config.seed)
    if backbone is None:
        name = data.meta["encoder"]
        backbone = AutoModel.from_config(tiny_config(data, config)) if name == "tiny" else AutoModel.from_pretrained(name)
    if os.environ.get("ZI","1")=="1":
        for n,p in backbone.named_parameters():
            if n.endswith("output.dense.weight"): nn.init.zeros_(p)
    encoder = Encoder(backbone, config.pooling)
    if config.max_len > encoder.max_len():
        raise UserError(f"--max-len {config.max_len} > the {encoder.max_len()} tokens that the encoder can read; lower it")
    topk = int_list(config.topk, "--topk") if config.topk else [min(n, 64 << t) for t, n in enumerate(tree.levels)]
    depth = backbone.config.num_hidden_layers
    layers = ([int_list(group.replace("+", ","), "--layers") for group in config.layers.split(",")] if config.layers
              else choose_layers(depth, len(tree.levels) + 1))  # fmt: skip
    return Cascade(encoder, tree, topk, layers)


def run(config: Config) -> None:
    data, tree = data_stage.load(config.run), tree_stage.load(config.run)
    config = settle(config, data.meta["encoder"], RECIPES)
    model = build(data, tree, config).eval()
    batch = data.batch("train", np.arange(4), config.max_len)
    n_encoder = sum(p.numel() for p in model.encoder.parameters())
    n_heads = sum(p.numel() for p in model.parameters()) - n_encoder
    print(f"encoder {data.meta['encoder']}: {n_encoder:,} parameters; heads: {n_heads:,}")
    print(f"a batch of 4 documents: ids_BT {tuple(batch.ids_BT.shape)}, {len(batch.doc_P)} (document, label) pairs")
    features = model.features(batch)
    for t, level in enumerate(model.descend(features, batch, teacher=True)):
        nodes = level.logits_BKF[0].numel()
        print(f"level {t + 1}: reads hidden states {model.layers[t]} -> feature {tuple(features[t].shape)}; "
              f"parents_BK {tuple(level.parents_BK.shape)} -> logits_BKF {tuple(level.logits_BKF.shape)}: "
              f"{nodes:,} candidates of {model.counts[t + 1]:,}, {int(level.targets_BKF.sum())} of them positive")  # fmt: skip
    losses, _ = model.loss(batch)
    labels, scores = model.predict(batch, 5)
    print(f"loss per level {[round(x, 3) for x in losses.tolist()]}; predictions {tuple(labels.shape)}")


if __name__ == "__main__":
    main(run, Config, __doc__)
