"""Stage 3: the cascade, one encoder whose layers decide coarse to fine. Run by itself it walks through one batch.

    python 03_model.py --run runs/demo

Reads    RUN/data.npz, RUN/tree.npz
Writes   nothing; stage 4 trains this model

After CascadeXML (Kharbanda, Banerjee, Schultheis, Babbar; NeurIPS 2022). Every resolution of the label tree reads its
own layer of one transformer. The candidates at a resolution are the children of the best nodes of the one above; in
training the nodes with a positive label below them count as best, and the others, which scored high and are wrong, are
the hard negatives. The loss is binary cross-entropy over the candidates, summed over the resolutions. Left out here:
the authors' ensembles, several devices, one-vs-all without a tree.
Shapes   B batch, T tokens, D width, C clusters, F children of each (fan), K clusters kept, P positive pairs, S slots
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, PreTrainedModel

from artifacts import UserError, flag, int_list, main, positive, pretrained, settle

data_stage = import_module("01_data")
tree_stage = import_module("02_label_tree")

RECIPES = {"tiny": {"max_len": 64, "pooling": "mean"}, "pretrained": {"max_len": 128, "pooling": "first"}}
RANKINGS = ("parent", "path", "label")  # p(label) p(its cluster); the product down the whole path; p(label)


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/demo", "folder of this run's artifacts")
    max_len: int = flag(None, "tokens of a document, special ones included [tiny 64, else 128]", positive)
    topk: str = flag(None, "clusters kept per cluster level [192,384,768]", str)
    pooling: str = flag(None, "a document's feature: 'first' token or 'mean' of all [tiny mean, else first]", str)
    layers: str = flag("", "hidden states read per level, such as 5+6,8,10,12 (0: embeddings) [spaced by depth]")
    tiny: str = flag("1,256", "layers and width of the encoder 'tiny'")
    seed: int = flag(0, "seed of every random choice")


class Level(NamedTuple):
    """One resolution of one batch: the candidates are the F children of each of the K clusters kept above."""

    parents_BK: Tensor  # int64, nodes of the level above (the root: zeros (B, 1))
    picked_BK: Tensor | None  # int64, where they stood among the candidates of the level above; None below the root
    logits_BKF: Tensor  # float32, -inf in an empty slot
    targets_BKF: Tensor | None  # float32, 1 where a label below the node is positive; None without a teacher


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
    score = logits_BKF.detach()
    if targets_BKF is not None:
        score = score.sigmoid() + targets_BKF
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
    scores, places = scores_BK.topk(min(k, scores_BK.shape[1]), dim=1)
    missing = (0, k - scores.shape[1])
    return F.pad(labels_BK.gather(1, places), missing, value=-1), F.pad(scores, missing, value=-torch.inf)


class Head(nn.Module):
    """A linear classifier per node, stored cluster by cluster: the children of one node are one contiguous block."""

    def __init__(self, n_clusters: int, fan: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_clusters, fan, width))
        self.bias = nn.Parameter(torch.full((n_clusters, fan), -4.0))  # few nodes are positive: start with p = 0.02

    def block(self, x_BD: Tensor, start: int, stop: int) -> Tensor:
        """Logits (B, stop - start, F) of the children of a range of clusters."""
        weight, bias = self.weight[start:stop], self.bias[start:stop]
        return F.linear(x_BD, weight.flatten(0, 1)).view(len(x_BD), *bias.shape) + bias

    def forward(self, x_BD: Tensor, clusters_BK: Tensor | None = None) -> Tensor:
        """Logits (B, K, F) of the children of the clusters given, or (B, C, F) of all nodes."""
        C, fan = self.bias.shape
        # A product with the whole table reads C blocks, a gather reads B * K: take the smaller. Same up to rounding.
        if clusters_BK is None or clusters_BK.numel() >= C:
            logits = self.block(x_BD, 0, C)
            return logits if clusters_BK is None else logits.gather(1, clusters_BK[..., None].expand(-1, -1, fan))
        return torch.einsum("bd,bkfd->bkf", x_BD, self.weight[clusters_BK]) + self.bias[clusters_BK]


def choose_layers(depth: int, n_levels: int) -> list[list[int]]:
    """Hidden states per level: the last level reads the last layer, each one above it a sixth of the depth earlier, the
    first two layers at once: for 12 layers 7+8,10,12 or 5+6,8,10,12, as published."""
    at = [max(1, int(depth * (1 - (n_levels - 1 - t) / 6) + 0.5)) for t in range(n_levels)]
    return [[at[0] - 1, at[0]] if n_levels > 1 and at[0] > 1 else [at[0]]] + [[layer] for layer in at[1:]]


def tiny_backbone(data: data_stage.Data, config: Config) -> PreTrainedModel:
    """A small BERT to be trained from scratch, without dropout: the heads have theirs."""
    depth, width = int_list(config.tiny, "--tiny", 2)
    return AutoModel.from_config(BertConfig(
        vocab_size=data.meta["vocab_size"], pad_token_id=data.meta["pad"], type_vocab_size=1, num_hidden_layers=depth,
        hidden_size=width, intermediate_size=2 * width, num_attention_heads=int(np.gcd(width, max(1, width // 64))),
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


class Encoder(nn.Module):
    """Any bidirectional transformer of the transformers library, giving the pooled hidden states of chosen layers.
    What differs between families is settled elsewhere: special tokens come from the tokeniser by way of 01_data.py,
    token types and positions from the model's own defaults."""

    def __init__(self, backbone: PreTrainedModel, pooling: str, max_len: int, from_scratch: bool = False) -> None:
        super().__init__()
        self.backbone, self.pooling, self.from_scratch = backbone, pooling, from_scratch
        if pooling not in ("first", "mean"):
            raise UserError(f"--pooling {pooling}: expected 'first' or 'mean'")
        backbone.pooler = None  # BERT's extra layer on the last hidden state, which nothing here reads
        # What the position table holds; RoBERTa and MPNet start to count behind their padding id.
        table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
        first = -1 if getattr(table, "padding_idx", None) is None else table.padding_idx
        if max_len > (getattr(backbone.config, "max_position_embeddings", None) or max_len + first + 1) - first - 1:
            raise UserError(f"--max-len {max_len} is more than the encoder's positions; lower it")

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, layers: set[int]) -> dict[int, Tensor]:
        """{layer: pooled feature (B, D)} of the hidden states asked for; 0 is the embeddings."""
        hidden = self.backbone(input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True).hidden_states
        if self.pooling == "first":
            return {layer: hidden[layer][:, 0] for layer in layers}
        share_B1T = (mask_BT / mask_BT.sum(1, keepdim=True))[:, None]
        return {layer: (share_B1T.to(hidden[layer].dtype) @ hidden[layer]).squeeze(1) for layer in layers}


class Cascade(nn.Module):
    """Encoder, a head per level, and the descent through the tree."""

    def __init__(self, encoder: Encoder, tree: tree_stage.Tree, topk: list[int], layers: list[list[int]]) -> None:
        super().__init__()
        self.encoder, self.topk, self.layers, self.amp = encoder, topk, layers, "off"
        self.counts = [1, *tree.levels, len(tree.slot_to_label)]  # nodes per level, from the root to the slots
        width, depth = encoder.backbone.config.hidden_size, encoder.backbone.config.num_hidden_layers
        n_levels = len(tree.levels) + 1
        if len(layers) != n_levels or any(not 0 <= layer <= depth for group in layers for layer in group):
            raise UserError(f"--layers {layers}: expected {n_levels} groups of hidden states between 0 and {depth}")
        fans = [below // above for above, below in zip(self.counts, self.counts[1:], strict=False)]
        most = [k * fan for k, fan in zip([1, *topk], fans, strict=False)]  # the children of what is kept above
        if len(topk) != len(tree.levels) or any(not 1 <= k <= n for k, n in zip(topk, most, strict=False)):
            raise UserError(f"--topk {topk}: levels {tree.levels} have at most {most[: len(tree.levels)]} candidates")
        self.heads = nn.ModuleList(Head(n, fan, width) for n, fan in zip(self.counts, fans, strict=False))
        self.join = nn.ModuleList(nn.Linear(len(g) * width, width) if len(g) > 1 else nn.Identity() for g in layers)
        rates = {3: (0.3, 0.3, 0.4), 4: (0.2, 0.25, 0.4, 0.5)}.get(n_levels, (0.3,) * n_levels)  # as published
        self.dropout = nn.ModuleList(nn.Dropout(rate) for rate in rates)
        slots = torch.from_numpy(tree.slot_to_label).long()
        label_to_slot = slots.argsort()[(slots < 0).sum() :]  # the empty slots, -1, sort to the front
        self.register_buffer("slot_to_label", slots, persistent=False)
        self.register_buffer("label_to_slot", label_to_slot, persistent=False)
        self.register_buffer("empty", (slots < 0).view(tree.levels[-1], -1), persistent=False)

    def features(self, batch: data_stage.Batch) -> list[Tensor]:
        """(B, D) per level. The encoder computes in the precision `amp`, the heads in float32: rounding makes ties."""
        kind, dtype = batch.ids_BT.device.type, {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.amp]
        with torch.autocast(kind, dtype, enabled=dtype is not None):
            pooled = self.encoder(batch.ids_BT, batch.mask_BT, {layer for group in self.layers for layer in group})
        return [join(torch.cat([pooled[layer] for layer in group], dim=1).to(self.heads[0].weight.dtype))
                for group, join in zip(self.layers, self.join, strict=True)]

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
                targets_BKF = match(node_P, batch.doc_P, parents_BK, self.counts[t], fan)
            yield Level(parents_BK, picked_BK, logits_BKF, targets_BKF)
            if t < len(self.topk):
                picked_BK = shortlist(logits_BKF, targets_BKF, self.topk[t])
                parents_BK = expand(parents_BK, fan).gather(1, picked_BK)

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
        return self.slot_to_label[expand(level.parents_BK, level.logits_BKF.shape[2])], scores, kept

    @torch.no_grad()
    def predict(self, batch: data_stage.Batch, k: int, ranking: str = "path") -> tuple[Tensor, Tensor]:
        """The k best labels of the beam and their log-probabilities, as best_k gives them."""
        labels_BK, scores, _ = self.beam(batch)
        return best_k(labels_BK, scores[ranking], k)

    @torch.no_grad()
    def predict_exact(self, batch: data_stage.Batch, k: int, ranking: str, chunk: int = 4096) -> tuple[Tensor, Tensor]:
        """As predict, but with every label scored: `chunk` leaf clusters at a time and a running top k."""
        features, scores, best = self.features(batch), None, None
        for head, x_BD in zip(self.heads[:-1], features, strict=False):
            scores = rank(head(x_BD), scores)
        for start in range(0, self.counts[-2], chunk):
            logits_BCF = self.heads[-1].block(features[-1], start, start + chunk)
            above = {name: score_BC[:, start : start + chunk] for name, score_BC in scores.items()}
            labels_S = self.slot_to_label.view(self.counts[-2], -1)[start : start + chunk].flatten()
            score_BS = rank(logits_BCF, above)[ranking].masked_fill(labels_S < 0, -torch.inf)
            found = labels_S.expand(score_BS.shape), score_BS
            best = best_k(*(torch.cat(pair, 1) for pair in zip(best, found, strict=True)) if best else found, k)
        return best

    def param_groups(self, lr: float, lr_encoder: float) -> list[dict]:
        """Parameters for the optimiser, with the paper's weight decays; none on biases and normalisations. The word
        embeddings of an encoder from scratch are a table of rarely met rows, and learn at the rate of the heads."""
        table = self.encoder.backbone.get_input_embeddings().weight if self.encoder.from_scratch else None
        groups: dict[tuple[float, float], list] = {}
        for name, parameter in self.named_parameters():
            in_encoder = name.startswith("encoder.") and parameter is not table
            decay = 0.0 if parameter.ndim == 1 or name.endswith("bias") else 0.05 if in_encoder else 0.005
            groups.setdefault((lr_encoder if in_encoder else lr, decay), []).append(parameter)
        return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


def build(data: data_stage.Data, tree: tree_stage.Tree, config: Config, backbone=None) -> Cascade:
    """The cascade before training, or around an encoder that is there already."""
    torch.manual_seed(config.seed)
    from_scratch = data.meta["encoder"] == "tiny"
    if backbone is None:
        backbone = tiny_backbone(data, config) if from_scratch else pretrained(AutoModel, data.meta["encoder"])
    # In float32 whatever the checkpoint's type: mixed precision is for the computation, not for the weights.
    encoder = Encoder(backbone.float(), config.pooling, config.max_len, from_scratch)
    topk = int_list(config.topk, "--topk") if config.topk else [min(n, 192 << t) for t, n in enumerate(tree.levels)]
    layers = ([int_list(group.replace("+", ","), "--layers") for group in config.layers.split(",")] if config.layers
              else choose_layers(backbone.config.num_hidden_layers, len(tree.levels) + 1))
    return Cascade(encoder, tree, topk, layers)


def run(config: Config) -> None:
    data, tree = data_stage.load(config.run), tree_stage.load(config.run)
    config = settle(config, RECIPES, data.meta["encoder"])
    model = build(data, tree, config).eval()
    batch = data.batch("train", np.arange(4), config.max_len)
    for name, part in (("encoder " + data.meta["encoder"], model.encoder), ("heads", model.heads)):
        print(f"{name}: {sum(parameter.numel() for parameter in part.parameters()):,} parameters")
    print(f"a batch of 4 documents: ids_BT {tuple(batch.ids_BT.shape)}, {len(batch.doc_P)} (document, label) pairs")
    features = model.features(batch)
    for t, level in enumerate(model.descend(features, batch, teacher=True)):
        print(f"level {t + 1}: hidden states {model.layers[t]} -> feature_BD {tuple(features[t].shape)}; parents_BK "
              f"{tuple(level.parents_BK.shape)} -> logits_BKF {tuple(level.logits_BKF.shape)}: each document scores "
              f"{level.logits_BKF[0].numel():,} of {model.counts[t + 1]:,} nodes; "
              f"{int(level.targets_BKF.sum())} positive in the batch")
    print(f"loss per level: {[round(loss, 2) for loss in model.loss(batch)[0].tolist()]}; "
          f"predict(batch, 5): labels and log-probabilities {[tuple(x.shape) for x in model.predict(batch, 5)]}")


if __name__ == "__main__":
    main(run, Config, __doc__)
