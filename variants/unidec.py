"""UniDEC (Kharbanda et al., WWW 2025; arXiv 2405.03714): labels have texts. One encoder reads
documents and labels, and a classifier learns beside it, in one loss.

    python -m variants.unidec --run runs/demo
    python -m variants.unidec --run runs/demo --loss bce
    python -m variants.unidec --run runs/demo --refresh 0          no hard negatives

Reads    RUN/data.npz (the labels' texts, too), RUN/tree.npz, RUN/model.pt (its settings)
Writes   RUN/unidec/    model.pt, log.jsonl, predictions.npz, predictions.val.npz;
         RUN/unidec/dual/ and RUN/unidec/classifier/ with the predictions of one half each;
         with other settings, RUN/unidec-LOSS-REFRESH/ or the like

The cascade knows a label by a number, and learns its weights from its documents alone. UniDEC reads
a label's text with the encoder of the documents, so it knows something of a label that has two
documents, or none. What differs from the cascade:

- Dual encoder: the text of a document and the text of a label, by the same encoder, become unit
  vectors of one space. Their cosine is the score.
- Classifier: a vector per label, as in one-vs-all, but of the same width and scale. There is no
  tree and no shortlist.
- Both are trained on the label pool of the batch (variants/label_pool.py), which all documents
  share: positives, hard negatives that the dual encoder finds, and positives of the others.
- Pick-some-label loss (PSL): a softmax over the pool in place of the cascade's independent yes or
  no for each label. A document's positives in the pool each get a softmax of their own, averaged:

      L_i = -1/|P_i| sum over p in P_i of log( exp s_ip / sum over j in the pool of exp s_ij )

  Labels that this batch did not pick do not count. The total is half the dual encoder's loss, half
  the classifier's.
- Prediction puts both vectors side by side: the sum of two cosines, with every label.

Other than the authors', on purpose. The encoder, the number of passes and the batch size are the
cascade's (theirs: DistilBERT, 150 passes, 1,024 documents). Rates are 1 : 2 : 10 for encoder, maps
and label table, as theirs, but words of an encoder from scratch learn as fast as the table; the
schedule is stage 4's. Before the first mining, the cascade's batches stand where theirs are random
clusters. Labels without training documents are not mined, so that nothing drives them away from all
documents. Known labels (a package's own name) are left out of the loss. Biases do not decay. BCE is
summed over the pool. Left out: their other forms of the loss (transposed, balanced, PSL + BCE).

Shapes   N documents, B documents of a batch, T tokens, D width of the encoder, E width of the
         embeddings, A labels of the pool, L labels, P (document, label) pairs
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from plumbing.cli import flag, main, natural, positive
from plumbing.errors import UserError
from plumbing.training_log import logger
from variants import common
from variants.common import stages
from variants.label_pool import Batch, Batches

NAME = "unidec"
WIDTH = 256  # E
SCALE = 18.0  # cosines are between -1 and 1; a softmax needs larger differences. It does not learn
TEXT_LEN = 24  # tokens of a label's text
CHUNK = 512  # label texts encoded at a time


@dataclass(frozen=True)
class Config(common.Config):
    loss: str = flag("psl", "psl, decoupled (other positives leave the softmax) or bce")
    pool: int = flag(512, "labels in the pool of a batch, at most", positive)
    refresh: int = flag(2, "passes from one mining of hard negatives to the next; 0: none", natural)


# 1. The losses. Each takes scores (B, A) of a pool, and what is positive, and gives (B,).


def pick_some_labels(score_BA: Tensor, is_positive_BA: Tensor) -> Tensor:
    """PSL: for each positive its softmax over the whole pool; the mean over a document's positives.

    With one positive this is InfoNCE. With all labels in the pool it is the cross-entropy of the
    softmax with the uniform distribution over the positives.
    """
    log_share_BA = score_BA.log_softmax(dim=1)
    return mean_over_positives(-log_share_BA, is_positive_BA)


def decoupled(score_BA: Tensor, is_positive_BA: Tensor) -> Tensor:
    """As PSL, but a positive competes with the negatives alone, not with the other positives."""
    negative_BA = score_BA.masked_fill(is_positive_BA, -torch.inf)
    all_negatives_B1 = negative_BA.logsumexp(dim=1, keepdim=True)
    # The logarithm of the sum of one positive's exp and the negatives'.
    log_sum_BA = torch.logaddexp(score_BA, all_negatives_B1)
    return mean_over_positives(log_sum_BA - score_BA, is_positive_BA)


def bce(score_BA: Tensor, is_positive_BA: Tensor) -> Tensor:
    """The cascade's loss: yes or no for each label by itself, summed over the pool."""
    correct_BA = torch.where(is_positive_BA, score_BA, 0.0)
    return (functional.softplus(score_BA) - correct_BA).sum(1)


def mean_over_positives(value_BA: Tensor, is_positive_BA: Tensor) -> Tensor:
    of_positives_BA = torch.where(is_positive_BA, value_BA, 0.0)
    n_positives_B = is_positive_BA.sum(1)
    return of_positives_BA.sum(1) / n_positives_B.clamp(min=1)


LOSSES = {"psl": pick_some_labels, "decoupled": decoupled, "bce": bce}


# 2. The model. First the dual encoder by itself, then both halves.


class DualEncoder(nn.Module):
    """One encoder for documents and label texts; their score is the cosine of two vectors.

    `texts`: the texts of all L labels, padded. They are data, and are not saved with the model.
    """

    rankings = ("dual",)

    def __init__(
        self, encoder: stages.model.Encoder, texts: stages.data.Batch, loss: str = "psl"
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.amp = "off"  # precision of the encoder
        self.form = LOSSES[loss]
        self.ranking = self.rankings[0]  # what predict() ranks by
        self.text_ids_LT = nn.Buffer(texts.ids_BT, persistent=False)
        self.text_mask_LT = nn.Buffer(texts.mask_BT, persistent=False)
        self.text_LE = None  # vectors of all texts, while the weights stand still
        # From the encoder to the space in which documents meet label texts.
        self.to_dual = new_map(encoder.width)
        self.dropout = nn.Dropout(0.1)

    # From texts to vectors.

    def mean_pooled(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, D), float32: the encoder's last layer, the mean of a text's tokens."""
        dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.amp]
        with torch.autocast(ids_BT.device.type, dtype, enabled=dtype is not None):
            features = self.encoder(ids_BT, mask_BT, {self.encoder.depth})
        return features[self.encoder.depth].float()

    def dual(self, mean_BD: Tensor) -> Tensor:
        """(B, E), length 1: texts in the space that documents and labels share."""
        x_BE = self.dropout(self.to_dual(mean_BD).tanh())
        return functional.normalize(x_BE, dim=1)

    def texts(self, label_A: Tensor) -> Tensor:
        """(A, E), length 1: some labels by their texts."""
        # Cut off the padding that none of them needs.
        mask_AT = self.text_mask_LT[label_A]
        longest = int(mask_AT.sum(1).max())
        ids_AT = self.text_ids_LT[label_A][:, :longest]
        return self.dual(self.mean_pooled(ids_AT, mask_AT[:, :longest]))

    # Training.

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(losses (1,), how many positives found no place in the pool ())."""
        document_BE = self.dual(self.mean_pooled(batch.ids_BT, batch.mask_BT))
        cosine_BA = document_BE @ self.texts(batch.pool_A).T
        return self.mean_loss(SCALE * cosine_BA, batch).view(1), missed(batch)

    def mean_loss(self, score_BA: Tensor, batch: Batch) -> Tensor:
        """The mean over the documents that have a positive in the pool; the others are dropped."""
        # What is known of a document beforehand has no part in its loss.
        score_BA = score_BA.masked_fill(batch.is_known_BA, -torch.inf)
        loss_B = self.form(score_BA, batch.is_positive_BA)
        counts_B = batch.is_positive_BA.any(1)
        return (loss_B * counts_B).sum() / counts_B.sum().clamp(min=1)

    def param_groups(self, lr: float, lr_encoder: float) -> list[dict]:
        """Three rates, 1 : 2 : 10 with the cascade's settings. Biases and norms do not decay."""
        groups = {}
        for name, parameter in self.named_parameters():
            if parameter is self.encoder.table or name == "table_LE":
                rate = lr
            elif name.startswith("encoder."):
                rate = lr_encoder
            else:
                rate = 2 * lr_encoder
            decay = 0.05 if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
        return [
            {"params": parameters, "lr": rate, "weight_decay": decay, "rows": False}
            for (rate, decay), parameters in groups.items()
        ]

    # Prediction: every label is scored.

    @property
    def scored(self) -> int:
        """How many labels are scored for a document (variants/compare.py asks)."""
        return len(self.text_ids_LT)

    def train(self, mode: bool = True) -> "DualEncoder":
        self.text_LE = None  # the weights may move, or have moved
        return super().train(mode)

    @torch.no_grad()
    def all_texts(self) -> Tensor:
        """(L, E): all labels by their texts. They are the same for all batches: encoded once."""
        if self.text_LE is None:
            every_label = torch.arange(len(self.text_ids_LT), device=self.text_ids_LT.device)
            parts = [self.texts(label_A) for label_A in every_label.split(CHUNK)]
            self.text_LE = torch.cat(parts)
        return self.text_LE

    def cosines(self, batch: stages.data.Batch) -> dict[str, Tensor]:
        """{ranking: (B, L)} of all labels."""
        document_BE = self.dual(self.mean_pooled(batch.ids_BT, batch.mask_BT))
        return {"dual": document_BE @ self.all_texts().T}

    @torch.no_grad()
    def predict(
        self, batch: stages.data.Batch, k: int, ranking: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k best labels and their scores, by the model's own ranking or by another.

        The files have exp(score), from 0 to 1. A cosine is no logarithm of a probability, so it is
        squeezed into one: the order says something, the number does not.
        """
        cosine_BL = self.cosines(batch)[ranking or self.ranking]
        score_BL = functional.logsigmoid(cosine_BL)
        label_BL = torch.arange(score_BL.shape[1], device=score_BL.device).expand_as(score_BL)
        return stages.model.best_k(label_BL, score_BL, k)


class UniDEC(DualEncoder):
    """The dual encoder, and a classifier that reads the same encoder: a vector for each label."""

    rankings = ("both", "dual", "classifier")

    def __init__(
        self, encoder: stages.model.Encoder, texts: stages.data.Batch, loss: str = "psl"
    ) -> None:
        super().__init__(encoder, texts, loss)
        # A space of its own, in which documents meet the table.
        self.to_classifier = new_map(encoder.width)
        self.table_LE = nn.Parameter(torch.empty(len(texts.ids_BT), WIDTH))
        nn.init.xavier_uniform_(self.table_LE)
        # With BCE the length of a label's vector has learnt how frequent the label is. It counts in
        # the ranking then, and must be known when the model is loaded.
        self.length_counts = nn.Buffer(torch.tensor(loss == "bce"))

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """([half the dual encoder's loss, half the classifier's], positives not in the pool)."""
        # 1. The encoder reads the documents once, for both halves, and the texts of the pool.
        mean_BD = self.mean_pooled(batch.ids_BT, batch.mask_BT)
        # 2. Dual encoder: document against text.
        dual_BA = SCALE * self.dual(mean_BD) @ self.texts(batch.pool_A).T
        # 3. Classifier: document against table. These vectors keep their lengths in training.
        x_BE = self.dropout(self.to_classifier(mean_BD))
        table_AE = self.dropout(self.table_LE[batch.pool_A])
        classifier_BA = SCALE * x_BE @ table_AE.T
        losses = [self.mean_loss(dual_BA, batch), self.mean_loss(classifier_BA, batch)]
        return 0.5 * torch.stack(losses), missed(batch)

    def cosines(self, batch: stages.data.Batch) -> dict[str, Tensor]:
        """{ranking: (B, L)} of all labels: both halves, the dual encoder, the classifier."""
        # The classifier's vectors are ranked with length 1, so that both halves have the same say.
        table_LE = self.table_LE
        if not self.length_counts:
            table_LE = functional.normalize(table_LE, dim=1)
        mean_BD = self.mean_pooled(batch.ids_BT, batch.mask_BT)
        x_BE = functional.normalize(self.to_classifier(mean_BD), dim=1)
        dual_BL = self.dual(mean_BD) @ self.all_texts().T
        classifier_BL = x_BE @ table_LE.T
        # Two vectors side by side: their product is the sum of both products.
        return {"both": dual_BL + classifier_BL, "dual": dual_BL, "classifier": classifier_BL}


def new_map(width: int) -> nn.Linear:
    """From the encoder's width to E, as the authors start it."""
    linear = nn.Linear(width, WIDTH)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def missed(batch: Batch) -> Tensor:
    """How many positives of the batch found no place in its pool."""
    return len(batch.label_P) - batch.is_positive_BA.sum()


def has_texts(data: stages.data.Data) -> bool:
    return len(data.splits["label"].ids) > 0


def label_texts(data: stages.data.Data) -> stages.data.Batch:
    """The texts of all labels, cut to TEXT_LEN tokens. UserError where there are none."""
    if not has_texts(data):
        raise UserError(
            "the labels of this corpus have no texts, and there is nothing else for the dual "
            'encoder to read; give labels.jsonl.gz a "text" for each label, and run 01_data.py'
        )
    return data.batch("label", np.arange(len(data.names)), TEXT_LEN)


def build(
    data: stages.data.Data,
    tree: stages.tree.Tree,
    config: stages.train.Config,
    encoder: stages.model.Encoder | None = None,
    loss: str = "psl",
    model_type: type[DualEncoder] = UniDEC,
) -> DualEncoder:
    """What stages.train.load needs. The tree is not used."""
    torch.manual_seed(config.seed)
    encoder = encoder or stages.model.make_encoder(data, config)
    encoder.pooling = "mean"  # whatever the cascade has
    return model_type(encoder, label_texts(data), loss)


# 3. Training.


def embeddings(
    model: DualEncoder, data: stages.data.Data, config: stages.train.Config
) -> tuple[Tensor, Tensor]:
    """What is mined with: vectors of all training documents (N, E) and of all labels (L, E)."""

    @torch.no_grad()
    def one(batch: stages.data.Batch, k: int) -> dict[str, np.ndarray]:
        mean_BD = model.mean_pooled(batch.ids_BT, batch.mask_BT)
        return {"dual": model.dual(mean_BD).cpu().numpy()}

    was_training = model.training
    found = stages.train.predict_split(
        model, data, "train", config.max_len, 2 * config.batch_size, one, 0
    )
    text_LE = model.all_texts()
    model.train(was_training)
    return torch.from_numpy(found["dual"]).to(text_LE.device), text_LE


def train(
    out: Path, model: DualEncoder, config: stages.train.Config, pool: int, refresh: int
) -> tuple[DualEncoder, float]:
    """(the model as it was after its best pass, seconds without validation)."""
    data = stages.data.load(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    model.amp = config.amp

    def find() -> tuple[Tensor, Tensor]:
        return embeddings(model, data, config)

    batches = Batches(data, config, pool, refresh, find)
    start = time.perf_counter()
    validating = common.fit_and_keep_best(model, batches, data, config, logger(out, config))
    return model.eval(), time.perf_counter() - start - validating


def folder_name(config: Config) -> str:
    return common.name_with(NAME, config, "loss", "pool", "refresh")


@common.owns_its_folder(folder_name)
def run(config: Config) -> None:
    if config.loss not in LOSSES:
        raise UserError(f"--loss {config.loss}: expected one of {', '.join(LOSSES)}")
    out = common.folder(config.run, folder_name(config), "data.npz", "tree.npz")
    # 1. What an interrupted training has left has to go.
    common.clear(out)
    # 2. Train, with the cascade's settings, and write model.pt.
    train_config = common.cascade_settings(config.run, out)
    data = stages.data.load(out)
    tree = stages.tree.load(out)
    model = build(data, tree, train_config, loss=config.loss)
    model, seconds = train(out, model, train_config, config.pool, config.refresh)
    common.save_model(out, model, train_config, "both", NAME)
    # 3. Predict the validation and test splits with both halves, and with each by itself.
    for ranking in model.rankings:
        model.ranking = ranking
        place = out
        if ranking != "both":
            place = common.folder(out, ranking, "data.npz", "tree.npz")
            stages.tree.load(place)  # not used, but on record in what is written
        print(f"ranked by {ranking}")
        common.test(place, model, train_config, NAME, seconds)


if __name__ == "__main__":
    main(run, Config, __doc__)
