"""InceptionXML and SyncXML (Kharbanda et al., SIGIR 2023): short texts without a transformer.

    python -m variants.inception_xml --run runs/demo                      SyncXML
    python -m variants.inception_xml --run runs/demo --system inception_xml
    python -m variants.inception_xml --run runs/demo --system word_cnn    controls: another trunk
    python -m variants.inception_xml --run runs/demo --system word_mean
    python -m variants.inception_xml --run runs/demo --topk 96 --detach 0
    python -m variants.inception_xml --run runs/demo --shuffle    words in a random order

Reads    RUN/data.npz, RUN/tree.npz, RUN/model.pt (its settings)
Writes   RUN/sync_xml/, RUN/inception_xml/, ...    run folders: tree.npz, model.pt, predictions.npz;
         with other flags RUN/sync_xml-topk96-detach0/, and so on

A few words have hardly any order that a convolution along them could read. So the *trunk* looks
along the dimensions of the word vectors instead: after two products that let words and dimensions
exchange what they know, a convolution takes the words for its channels and slides over the 300
dimensions. InceptionXML scores all labels with what comes out. SyncXML scores clusters, and the
labels of a shortlist, as the cascade does. For its first passes it keeps the gradient of the labels
out of the trunk, so that the shortlist settles before the labels pull at what it reads.

What differs from the cascade: the trunk in place of the transformer, and behind it a layer for each
level, with a shortcut around it. Tree, shortlist with its teacher, loss, beam and RowAdam are the
cascade's. So is the start of the biases at the log odds. Heads first does not apply, since nothing
here is pretrained.

Deviations from the authors, and why:
- Word pieces and random vectors in place of words and GloVe: data.npz has no others.
- One cluster level of the run's own tree. 10 passes in place of 45.
- The loss is the sum over a document's candidates, theirs is the mean. Their label level of SyncXML
  has no biases.
- Batches come from stage 4. They are shuffled but for documents of fewer than 32 pieces, which
  stand together, and batch norm sees that.
- Left out: a dropout behind the projection, which InceptionXML alone has.

The controls have InceptionXML's head: `word_cnn` slides over the words, and `word_mean` takes the
mean of the vectors.

With --shuffle, the words of every document stand in a random order, drawn once, in all splits. A
word is a piece and the pieces behind it that begin with ##. Only the first W pieces, which are all
that a system here reads, change places: so it reads the same pieces as without.

Shapes   B documents, W = 32 words (pieces), E = 300 dimensions of a word's vector, D = 480 width
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from plumbing.cli import flag, main, natural, positive
from plumbing.errors import UserError
from plumbing.store import load_npz, load_pt, save_npz
from variants import common
from variants.common import finest, none, stages, train_in

W = 32
E = 300
D = 480
# Settings in which these systems differ from their cascade.
ITS_OWN = (
    "topk", "layers", "dropout", "epochs", "head_epochs", "lr", "lr_encoder", "max_len", "pooling",
    "join", "amp",
)  # fmt: skip


@dataclass(frozen=True)
class Config(common.Config):
    system: str = flag("sync_xml", "sync_xml, inception_xml, word_cnn or word_mean")
    epochs: int = flag(10, "passes over the training documents", positive)
    topk: int = flag(0, "clusters that sync_xml keeps (0: as many as the cascade)", natural)
    detach: int = flag(
        2, "first passes in which the labels of sync_xml teach the trunk nothing", natural
    )
    shuffle: bool = flag(False, "train and test on documents whose words are shuffled")


# 1. Trunks: from word vectors (B, W, E) to a feature (B, D).


class Attention(nn.Module):
    """Words, and then dimensions, exchange what they know. At the start it changes nothing.

    Both are products of matrices, without a softmax.
    """

    def __init__(self) -> None:
        super().__init__()
        self.words = spectral_norm(bare_linear(W, W))
        self.dimensions = spectral_norm(bare_linear(E, E))
        self.gates = nn.Parameter(torch.zeros(2))

    def forward(self, e_BWE: Tensor) -> Tensor:
        # 1. (e e^T)(W1 e): how much words are alike, times words that are mixed.
        mixed_BWE = self.words(e_BWE.mT).mT
        u_BWE = e_BWE + self.gates[0] * ((e_BWE @ e_BWE.mT) @ mixed_BWE)
        # 2. (u^T e)(W2 u^T): the same for dimensions. It pairs the result with what came in.
        #    Of the three factors the last two come first, since (W, W) is small.
        mixed_BEW = self.dimensions(u_BWE).mT
        v_BEW = u_BWE.mT @ (e_BWE @ mixed_BEW)
        return u_BWE + self.gates[1] * v_BEW.mT


def bare_linear(n_in: int, n_out: int) -> nn.Linear:
    """A linear map without a bias."""
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.xavier_normal_(layer.weight)
    return layer


class Inception(nn.Module):
    """The trunk of the paper: convolutions whose channels are the words."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.project = nn.Conv1d(W, W, 1)
        self.norm_projected = nn.BatchNorm1d(W)
        # Three views of the dimensions: windows of 4, 8 and 16, each a quarter as long as E.
        self.views = nn.ModuleList()
        for width, padding in ((4, 0), (8, 2), (16, 6)):
            view = nn.Conv1d(W, W, width, stride=4, padding=padding, padding_mode="circular")
            self.views.append(view)
        self.norm_views = nn.BatchNorm1d(3 * W)
        self.narrow = nn.Conv1d(3 * W, W, 16, stride=4)
        self.norm_narrow = nn.BatchNorm1d(W)
        for layer in (self.project, *self.views, self.narrow):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, e_BWE: Tensor, is_word_BW: Tensor) -> Tensor:
        x = self.attention(e_BWE)
        x = self.norm_projected(functional.gelu(self.project(x)))
        x = torch.cat([view(x) for view in self.views], dim=1)  # (B, 96, 75)
        x = functional.dropout(self.norm_views(functional.gelu(x)), 0.25, self.training)
        x = self.norm_narrow(functional.gelu(self.narrow(x)))  # (B, 32, 15)
        return x.flatten(1)


class WordCnn(nn.Module):
    """A control: convolutions that slide over the words, and the largest value of each."""

    def __init__(self) -> None:
        super().__init__()
        self.views = nn.ModuleList(
            nn.Conv1d(E, 32, width, padding=width // 2) for width in (3, 5, 7)
        )
        self.widen = nn.Linear(96, D)

    def forward(self, e_BWE: Tensor, is_word_BW: Tensor) -> Tensor:
        x = torch.cat([functional.gelu(view(e_BWE.mT)) for view in self.views], dim=1)
        return self.widen(x.amax(dim=2))


class WordMean(nn.Module):
    """A control: the mean of the vectors of the words that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Linear(E, D)

    def forward(self, e_BWE: Tensor, is_word_BW: Tensor) -> Tensor:
        n_B1 = is_word_BW.sum(1, keepdim=True).clamp(min=1)
        return self.widen(e_BWE.sum(1) / n_B1)


class Trunk(nn.Module):
    """Stands where the cascade has its encoder: token ids in, hidden state 1 out."""

    width = D
    depth = 1

    def __init__(self, layers: nn.Module, meta: dict) -> None:
        super().__init__()
        self.n_prefix = len(meta["prefix"])
        self.n_suffix = len(meta["suffix"])
        self.pad = meta["pad"]
        # A word that is not there has the vector 0, and it stays so.
        self.vectors = nn.Embedding(meta["vocab_size"], E, padding_idx=self.pad)
        self.layers = layers

    @property
    def table(self) -> Tensor:
        """The word vectors: they learn from scratch, as the heads do."""
        return self.vectors.weight

    def words(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, W): the first W pieces, without special tokens; padded with the id of padding."""
        # The tokens of a document are prefix, pieces, suffix. A place is a piece if it is behind
        # the prefix and there are still as many tokens to come as the suffix has.
        n_around = self.n_prefix + self.n_suffix
        is_piece_BT = mask_BT[:, n_around:][:, :W].bool()
        n_pieces = is_piece_BT.shape[1]
        pieces_BT = ids_BT[:, self.n_prefix : self.n_prefix + n_pieces]
        pieces_BT = torch.where(is_piece_BT, pieces_BT, self.pad)
        return functional.pad(pieces_BT, (0, W - n_pieces), value=self.pad)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, layers: set[int]) -> dict[int, Tensor]:
        words_BW = self.words(ids_BT, mask_BT)
        e_BWE = functional.dropout(self.vectors(words_BW), 0.25, self.training)
        return {1: self.layers(e_BWE, words_BW != self.pad)}

    def description(self) -> None:
        """There is nothing to describe: `build` makes the trunk from data.npz."""
        return


# 2. The models: a trunk, a layer with a shortcut for each level, and the cascade's heads.


class Layer(nn.Module):
    """x + GELU(Linear(x)), with batch norm or with a weight of bounded size."""

    def __init__(self, with_norm: bool) -> None:
        super().__init__()
        linear = nn.Linear(D, D)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.linear = linear if with_norm else spectral_norm(linear)
        self.norm = nn.BatchNorm1d(D) if with_norm else nn.Identity()

    def forward(self, x_BD: Tensor) -> Tensor:
        dropped_BD = functional.dropout(x_BD, 0.25, self.training)
        return x_BD + self.norm(functional.gelu(self.linear(dropped_BD)))


class Short(stages.model.Cascade):
    """A cascade on a trunk. Every level reads the trunk through a layer of its own."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        is_alone = len(self.heads) == 1  # InceptionXML scores every label
        self.own_layers = nn.ModuleList(Layer(with_norm=is_alone) for _ in self.heads)
        self.detached = 0  # batches in which the labels teach the trunk nothing
        self.n_batches = nn.Buffer(torch.zeros((), dtype=torch.int64))  # so far

    def features(self, batch: stages.data.Batch, encoder=None) -> list[Tensor]:
        h_BD = self.scaled(self.pooled(batch, encoder))[:, 0]
        read = [h_BD] * len(self.heads)
        if self.training:
            # Does the level of the labels only look at the trunk, in this batch?
            only_looks = self.n_batches < self.detached
            read[-1] = torch.where(only_looks, h_BD.detach(), h_BD)
            self.n_batches += 1
        return [layer(x_BD) for layer, x_BD in zip(self.own_layers, read, strict=True)]

    def param_groups(self, lr: float, lr_encoder: float) -> list[dict]:
        """One rate for everything, and no decay, as published."""
        groups = super().param_groups(lr, lr)
        return [group | {"weight_decay": 0.0} for group in groups]


def build(trunk: type[nn.Module], detach: int, data, tree, config, encoder=None) -> Short:
    """A model on a new trunk, on the cluster levels of the tree. `encoder` is not used."""
    torch.manual_seed(config.seed)
    encoder = Trunk(trunk(), data.meta)
    model = stages.model.build(data, tree, config, encoder, Short)
    if tree.levels:
        n_batches = -(-len(data.splits["train"]) // config.batch_size)
        model.detached = detach * n_batches
    return model


# Folder in RUN: (trunk, cluster levels of the tree).
SYSTEMS = {
    "sync_xml": (Inception, finest),
    "inception_xml": (Inception, none),
    "word_cnn": (WordCnn, none),
    "word_mean": (WordMean, none),
}


def builder(system: str, detach: int = 2):
    """`build` of a system, for stages 4 and 5.

    2 of 10 passes are about the share of the authors, who detach 10 of 45.
    """
    trunk, _ = SYSTEMS[system]
    return partial(build, trunk, detach)


# 3. Documents whose words stand in a random order.


def shuffled(split: stages.data.Split, goes_on_V: np.ndarray, seed: int) -> np.ndarray:
    """The token ids of a split, the words among the first W pieces of each document shuffled.

    `goes_on_V`: of every piece of the vocabulary, is it part of the word of the piece before?
    """
    rng = np.random.default_rng(seed)
    ids = split.ids.copy()
    for start, end in pairwise(split.offsets):
        read = slice(start, min(start + W, end))
        pieces = split.ids[read]
        # A word begins at each piece that does not go on. At the first one there is nothing to cut.
        begins = np.flatnonzero(~goes_on_V[pieces[1:]]) + 1
        words = np.split(pieces, begins)
        order = rng.permutation(len(words))
        ids[read] = np.concatenate([words[i] for i in order])
    return ids


def shuffle_data(out: Path, seed: int) -> None:
    """Put another data.npz in the place of the one in `out`: the same, with shuffled words."""
    arrays, meta = load_npz(out / "data.npz")
    data = stages.data.load(out)
    # 1. Which pieces go on? WordPiece marks them with ##.
    tokenizer = Tokenizer.from_str(data.tokenizer.decode())
    goes_on_V = np.zeros(meta["vocab_size"], bool)
    for piece, i in tokenizer.get_vocab().items():
        goes_on_V[i] = piece.startswith("##")
    # 2. All splits; the texts of labels are of no use here.
    for name in stages.data.SPLITS:
        arrays[f"{name}_ids"] = shuffled(data.splits[name], goes_on_V, seed)
    # 3. The record says of the encoder what it said before.
    config = stages.data.Config(run=str(out), **meta["config"])
    made_anew = ("format", "stage", "config", "versions", "made_from", "sha256")
    extra = {key: value for key, value in meta.items() if key not in made_anew}
    save_npz(out / "data.npz", config, arrays, **extra)


# 4. From the command line.


def folder_name(config: Config) -> str:
    """The folder in RUN: the system, and what is not the default."""
    parts = [config.system]
    default = Config()
    for key in ("epochs", "topk", "detach"):
        value = getattr(config, key)
        if value != getattr(default, key):
            parts.append(f"{key}{value}")
    if config.shuffle:
        parts.append("shuffle")
    return "-".join(parts)


@common.owns_its_folder(folder_name)
def run(config: Config) -> None:
    if config.system not in SYSTEMS:
        raise UserError(f"--system {config.system}: expected one of {', '.join(SYSTEMS)}")
    out = common.folder(config.run, folder_name(config), "data.npz")
    _, levels = SYSTEMS[config.system]
    content, _ = load_pt(Path(config.run) / "model.pt")
    if config.shuffle:
        shuffle_data(out, content["config"]["seed"])
    # The shortlist of the one cluster level that is kept: the cascade's, if none was asked for.
    data = stages.data.load(out)
    topk = ""
    if levels is finest:
        topk = str(config.topk or content["config"]["topk"].split(",")[-1])
    n_levels = 2 if topk else 1
    changes = {
        "topk": topk,
        "layers": ",".join(["1"] * n_levels),
        "dropout": "0.4,0.5" if topk else "0.5",
        "epochs": config.epochs,
        "head_epochs": 0,
        "lr": 5e-3,
        "lr_encoder": 5e-3,
        "max_len": W + len(data.meta["prefix"]) + len(data.meta["suffix"]),
        "pooling": "first",
        "join": "map",
        "amp": "off",
    }
    train_in(out, config.run, levels, builder(config.system, config.detach), **changes)


if __name__ == "__main__":
    main(run, Config, __doc__)
