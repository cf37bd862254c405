"""ALC (Almagro, Ortego and Jimenez, 2025; arXiv 2510.04551): for how many documents can the first
label be taken without a look? Losses that ask for scores which mean the same for every document.

    python -m variants.alc --run runs/demo --tcm 0 --beta 0      the base: the dual encoder alone
    python -m variants.alc --run runs/demo --beta 0              + the threshold-consistent margin
    python -m variants.alc --run runs/demo --tcm 0               + the pair losses
    python -m variants.alc --run runs/demo                       + both
    python -m variants.alc --run runs/demo --random              control: no hardest negatives

Reads    RUN/data.npz (the labels' texts, too), RUN/tree.npz, RUN/model.pt (its settings)
Writes   RUN/alc-TCM-BETA/   model.pt, log.jsonl, predictions.npz, predictions.val.npz

NOT THE AUTHORS' EQUATIONS. Neither their code nor the paper's equations were at hand. The pair
representation and the query-label loss are reconstructed from secondary accounts of the paper,
reviews that agree where they overlap. Of the query-batch loss no account gives the form: what is
here is our own reading. The margin is from the public code of Zhang et al. (ICLR 2024; arXiv
2307.04047). Whatever comes out of this file is no statement about the paper.

The answered share at 95%: choose on validation the threshold of the first label's score above which
95 in 100 are right, and count the test documents above it. What differs from the cascade and from
UniDEC's dual encoder (variants/unidec.py), which is the base:

- A softmax does not change when all of a document's scores move by the same number. So it does not
  ask that 0.7 mean the same for two documents, and one threshold for all needs just that.
- Threshold-consistent margin (TCM): cosines of positives below 0.9 are pulled up, cosines of
  negatives above 0.5 are pushed down, for all documents alike.
- Pair losses: a pair (document, label) has a representation of its own, both vectors with their
  difference and product. A small classifier must tell the positive from the hardest negative of the
  pool (query-label). Another must find the positive among hard negatives, which other documents
  have brought, too (query-batch). Both classifiers are thrown away after training.

Any rising function of all scores leaves the answered share as it is: calibration cannot raise it.
Rivals that cost nothing are other confidences of the same model: how far the first label is ahead
of the second, and the softmax over the best 100.

Left out: a base other than UniDEC's. The pool's labels are the batch that negatives come from.

Shapes   N documents, B documents of a batch, A labels of the pool, E width of the embeddings,
         J labels that one document is compared with in the query-batch loss, k labels predicted
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from plumbing.cli import flag, main, natural, positive
from plumbing.errors import UserError
from tools import report
from variants import common, unidec
from variants.common import stages
from variants.label_pool import Batch
from variants.unidec import SCALE, WIDTH, DualEncoder

NAME = "alc"
RIGHT = 0.9  # a positive's cosine should be above
WRONG = 0.5  # a negative's below
OTHERS = 7  # hard negatives that other documents have brought
TARGETS = (0.95, 0.9, 0.8)  # of the first labels answered, how many shall be right
RESAMPLES = 1000


@dataclass(frozen=True)
class Config(common.Config):
    tcm: float = flag(1.0, "weight of the threshold-consistent margin", float)
    beta: float = flag(0.1, "weight of both pair losses", float)
    random: bool = flag(False, "control: a random negative of the pool in place of the hardest")
    pool: int = flag(512, "labels in the pool of a batch, at most", positive)
    refresh: int = flag(2, "passes from one mining of hard negatives to the next; 0: none", natural)


# 1. The losses.


def tcm(cosine_BA: Tensor, is_positive_BA: Tensor, is_negative_BA: Tensor) -> Tensor:
    """How far positives are below RIGHT and negatives above WRONG, each a mean over those that are.

    Pairs on the right side of their margin have no part in it, nor a gradient.
    """
    low = cosine_BA[is_positive_BA & (cosine_BA <= RIGHT)]
    high = cosine_BA[is_negative_BA & (cosine_BA >= WRONG)]
    too_low = (RIGHT - low).sum() / max(1, len(low))
    too_high = (high - WRONG).sum() / max(1, len(high))
    return too_low + too_high


def pair_of(document_E: Tensor, label_E: Tensor) -> Tensor:
    """(..., 4 E): a document and a label side by side, their distance and their product.

    The last two parts stay the same when both change places.
    """
    distance_E = (document_E - label_E).abs()
    product_E = document_E * label_E
    return torch.cat([document_E, label_E, distance_E, product_E], dim=-1)


def hardest_negative(cosine_BA: Tensor, is_negative_BA: Tensor) -> Tensor:
    """(B,): the place in the pool of each document's negative with the largest cosine."""
    return cosine_BA.detach().masked_fill(~is_negative_BA, -torch.inf).argmax(1)


def brought_by_others(
    cosine_BA: Tensor, is_negative_BA: Tensor, hardest_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Places (B, J) in the pool and whether they count (B, J): hard negatives of other documents.

    Of the labels that are the hardest negative of some document: those that are a document's
    negatives, too, and not its own hardest; the OTHERS with the largest cosines.
    """
    # 1. The labels of the pool that are the hardest negative of some document.
    is_hardest_of_some_A = torch.zeros_like(is_negative_BA[0])
    is_hardest_of_some_A[hardest_B] = True
    # 2. Which of them are wrong for this document, and have not been brought by itself?
    is_other_BA = is_negative_BA & is_hardest_of_some_A
    is_other_BA.scatter_(1, hardest_B[:, None], False)
    # 3. The nearest. Where there are too few, the places left do not count.
    score_BA = cosine_BA.detach().masked_fill(~is_other_BA, -torch.inf)
    place_BJ = score_BA.topk(min(OTHERS, score_BA.shape[1]), dim=1).indices
    return place_BJ, is_other_BA.gather(1, place_BJ)


class PairHeads(nn.Module):
    """The two small classifiers of pairs. Prediction does not need them."""

    def __init__(self) -> None:
        super().__init__()
        self.query_label = nn.Sequential(
            nn.Linear(4 * WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 2)
        )
        self.query_batch = nn.Sequential(
            nn.Linear(4 * WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1, bias=False)
        )

    def query_label_loss(self, x_BE: Tensor, positive_BE: Tensor, negative_BE: Tensor) -> Tensor:
        """Right or wrong? Cross-entropy of a document's positive pair and its negative pair."""
        right_B2 = self.query_label(pair_of(x_BE, positive_BE))
        wrong_B2 = self.query_label(pair_of(x_BE, negative_BE))
        is_right_B = torch.ones(len(x_BE), dtype=torch.long, device=x_BE.device)
        loss_right = functional.cross_entropy(right_B2, is_right_B)
        loss_wrong = functional.cross_entropy(wrong_B2, 1 - is_right_B)
        return (loss_right + loss_wrong) / 2

    def query_batch_loss(self, x_BE: Tensor, label_BJE: Tensor, counts_BJ: Tensor) -> Tensor:
        """Which of J is the positive? It stands first. Cross-entropy over those that count."""
        pair_BJF = pair_of(x_BE[:, None].expand_as(label_BJE), label_BJE)
        score_BJ = self.query_batch(pair_BJF).squeeze(-1).masked_fill(~counts_BJ, -torch.inf)
        first_B = torch.zeros(len(x_BE), dtype=torch.long, device=x_BE.device)
        return functional.cross_entropy(score_BJ, first_B)


# 2. The model: UniDEC's dual encoder with more losses.


class ALC(DualEncoder):
    def __init__(
        self, encoder: stages.model.Encoder, texts: stages.data.Batch, loss: str = "psl"
    ) -> None:
        super().__init__(encoder, texts, loss)
        self.pairs = PairHeads()
        # Set by run(). A loaded model does not need them.
        self.tcm = 0.0
        self.beta = 0.0
        self.random = False

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """([base, TCM, pair losses], each with its weight; positives not in the pool)."""
        # 1. The base: UniDEC's dual encoder, and its pick-some-label loss.
        x_BE = self.dual(self.mean_pooled(batch.ids_BT, batch.mask_BT))
        label_AE = self.texts(batch.pool_A)
        cosine_BA = x_BE @ label_AE.T
        base = self.mean_loss(SCALE * cosine_BA, batch)
        # 2. The margin, on the cosines themselves. What is known beforehand is no negative.
        is_negative_BA = ~batch.is_positive_BA & ~batch.is_known_BA
        margin = tcm(cosine_BA, batch.is_positive_BA, is_negative_BA)
        losses = [base, self.tcm * margin]
        # 3. The pair losses.
        if self.beta:
            # Documents that have both a positive and a negative in the pool.
            both_B = batch.is_positive_BA.any(1) & is_negative_BA.any(1)
            of_pairs = self.pair_losses(
                x_BE[both_B],
                label_AE,
                cosine_BA[both_B],
                batch.is_positive_BA[both_B],
                is_negative_BA[both_B],
            )
            losses.append(self.beta * of_pairs)
        return torch.stack(losses), unidec.missed(batch)

    @property
    def parameters_needed(self) -> int:
        """Weights that prediction needs (variants/compare.py asks): not those of the pairs."""
        n_all = sum(parameter.numel() for parameter in self.parameters())
        return n_all - sum(parameter.numel() for parameter in self.pairs.parameters())

    def pair_losses(
        self,
        x_BE: Tensor,
        label_AE: Tensor,
        cosine_BA: Tensor,
        is_positive_BA: Tensor,
        is_negative_BA: Tensor,
    ) -> Tensor:
        """Query-label plus query-batch, of documents that have a positive and a negative."""
        if not len(x_BE):
            return x_BE.sum()  # 0
        # 1. One positive of each document, at random, and its hardest negative.
        positive_B = is_positive_BA.float().multinomial(1).squeeze(1)
        hardest_B = hardest_negative(cosine_BA, is_negative_BA)
        if self.random:
            hardest_B = is_negative_BA.float().multinomial(1).squeeze(1)
        positive_BE = label_AE[positive_B]
        negative_BE = label_AE[hardest_B]
        query_label = self.pairs.query_label_loss(x_BE, positive_BE, negative_BE)
        # 2. The same two, and negatives that other documents have brought.
        other_BJ, counts_BJ = brought_by_others(cosine_BA, is_negative_BA, hardest_B)
        place_BJ = torch.cat([positive_B[:, None], hardest_B[:, None], other_BJ], dim=1)
        counts_BJ = functional.pad(counts_BJ, (2, 0), value=True)
        query_batch = self.pairs.query_batch_loss(x_BE, label_AE[place_BJ], counts_BJ)
        return query_label + query_batch


def build(
    data: stages.data.Data,
    tree: stages.tree.Tree,
    config: stages.train.Config,
    encoder: stages.model.Encoder | None = None,
) -> ALC:
    """What stages.train.load needs."""
    return unidec.build(data, tree, config, encoder, model_type=ALC)


# 3. The answered share, and what of it may be chance.


def confidences(scores_Nk: np.ndarray) -> dict[str, np.ndarray]:
    """{name: (N,) in 0 to 1}: how sure is the model of its first label?

    The scores are those of the files, 1 / (1 + exp(-cosine)); -1 where there is no label.
    """
    scores_Nk = scores_Nk.clip(1e-6).astype(np.float64)
    cosine_Nk = np.log(scores_Nk) - np.log1p(-scores_Nk)
    first_N = cosine_Nk[:, 0]
    softmax_Nk = np.exp(SCALE * (cosine_Nk - first_N[:, None]))
    return {
        "score": scores_Nk[:, 0],
        "ahead of the second": (first_N - cosine_Nk[:, 1]) / 2,
        "softmax over the best": 1 / softmax_Nk.sum(axis=1),
    }


def load(out: Path) -> dict[str, tuple[dict[str, np.ndarray], np.ndarray]]:
    """{split: (confidences, whether the first label is right (N,))} of a run's predictions."""
    data = stages.data.load(out)
    found = {}
    for split in ("val", "test"):
        path = out / stages.eval.file_of(split)
        _, scores_Nk, correct_Nk = report.load(path, split, data)
        found[split] = (confidences(scores_Nk), correct_Nk[:, 0])
    return found


def answered(
    val: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], target: float
) -> tuple[float, float]:
    """(answered share of test, share of those that are right); each split: (confidence, is right).

    The threshold is chosen on validation.
    """
    threshold, _ = report.coverage(*val, target)
    confidence_N, is_right_N = test
    is_answered = confidence_N >= threshold
    right = is_right_N[is_answered].mean() if is_answered.any() else np.nan
    return is_answered.mean(), right


def print_answered(run: dict) -> None:
    """The answered shares of a run, as load() gives it, by each confidence."""
    val, val_right = run["val"]
    test, test_right = run["test"]
    print(f"{100 * test_right.mean():.1f}% of the first labels are right. Answered, and right:")
    for name in test:
        row = ""
        for target in TARGETS:
            share, right = answered((val[name], val_right), (test[name], test_right), target)
            row += f"   at {100 * target:.0f}: {100 * share:5.1f}, {100 * right:5.1f}"
        print(f"{name:24}{row}")


def difference(base: dict, other: dict, target: float, seed: int = 0) -> np.ndarray:
    """(3,): 2.5%, median, 97.5% of the answered share of `other` minus that of `base`.

    Both as load() gives them. A paired bootstrap: validation documents are drawn anew, which moves
    both thresholds, and then test documents, the same ones for both.
    """
    rng = np.random.default_rng(seed)
    n_val = len(base["val"][1])
    n_test = len(base["test"][1])
    gaps = []
    for _ in range(RESAMPLES):
        val_rows = rng.integers(0, n_val, n_val)
        test_rows = rng.integers(0, n_test, n_test)
        shares = []
        for run in (base, other):
            confidence, is_right = run["val"]
            val = (confidence["score"][val_rows], is_right[val_rows])
            confidence, is_right = run["test"]
            test = (confidence["score"][test_rows], is_right[test_rows])
            share, _ = answered(val, test, target)
            shares.append(share)
        gaps.append(shares[1] - shares[0])
    return np.quantile(gaps, (0.025, 0.5, 0.975))


# 4. Training.


def folder_name(config: Config) -> str:
    """RUN/alc-TCM-BETA, and what is not the default."""
    name = f"{NAME}-{config.tcm:g}-{config.beta:g}"
    return common.name_with(name, config, "random", "pool", "refresh")


@common.owns_its_folder(folder_name)
def run(config: Config) -> None:
    for key in ("tcm", "beta"):
        weight = getattr(config, key)
        if not 0 <= weight < np.inf:
            raise UserError(f"--{key} {weight}: expected a weight, 0 or more")
    out = common.folder(config.run, folder_name(config), "data.npz", "tree.npz")
    # 1. What an interrupted training has left has to go.
    common.clear(out)
    # 2. Train as UniDEC is trained, and write model.pt.
    train_config = common.cascade_settings(config.run, out)
    data = stages.data.load(out)
    tree = stages.tree.load(out)
    model = build(data, tree, train_config)
    model.tcm = config.tcm
    model.beta = config.beta
    model.random = config.random
    model, seconds = unidec.train(out, model, train_config, config.pool, config.refresh)
    common.save_model(out, model, train_config, model.ranking, NAME)
    # 3. Predict, and ask how many documents are answered.
    common.test(out, model, train_config, NAME, seconds)
    found = load(out)
    print_answered(found)
    # 4. If the base has been trained, how much more or less is answered?
    base = Path(config.run) / folder_name(replace(config, tcm=0.0, beta=0.0, random=False))
    if base != out and (base / "predictions.npz").exists():
        of_base = load(base)
        for target in TARGETS:
            low, middle, high = 100 * difference(of_base, found, target)
            print(f"at {100 * target:.0f} minus the base's: {low:+.1f}, {middle:+.1f}, {high:+.1f}")


if __name__ == "__main__":
    main(run, Config, __doc__)
