"""One check for each bug of the clinic: it is quiet on healthy code, and fails on the sick code.

    python -m course.clinic.checks        run them all on the code in this folder

Each takes a second or less, on a model with random weights and on documents made up here. A check
asks for a property that must hold whatever the numbers are: a test like these belongs beside such
code.
"""

import contextlib
import io
from types import SimpleNamespace

import numpy as np
import torch

from plumbing.label_level import Factors, RowAdam
from plumbing.stages import load_stages

stages = load_stages()

N_LABELS = 32
LEVELS = [4, 8]
LONGEST = 20  # tokens of a document


def made_up_split(n_documents: int, seed: int) -> "stages.data.Split":
    """Documents of random tokens, of many lengths, with one to three random labels each."""
    rng = np.random.default_rng(seed)
    ids = []
    labels = []
    for _ in range(n_documents):
        n_tokens = rng.integers(1, LONGEST)
        ids.append(rng.integers(4, 50, n_tokens))
        n_labels = rng.integers(1, 4)
        labels.append(np.sort(rng.choice(N_LABELS, n_labels, replace=False)))
    return stages.data.Split(
        np.concatenate(ids),
        stages.data.offsets_of(ids),
        np.concatenate(labels),
        stages.data.offsets_of(labels),
    )


def made_up(topk: str = "2,3") -> SimpleNamespace:
    """data, model (random weights) and config of a small cascade."""
    splits = {
        name: made_up_split(n_documents, seed)
        for seed, (name, n_documents) in enumerate((("train", 64), ("val", 40), ("test", 40)))
    }
    meta = {"encoder": "tiny", "vocab_size": 50, "prefix": [2], "suffix": [3], "pad": 0}
    names = [f"label {i}" for i in range(N_LABELS)]
    data = stages.data.Data(splits, names, meta)
    tree = stages.tree.Tree(np.arange(N_LABELS, dtype=np.int32), LEVELS)
    config = stages.train.Config(
        tiny="1,16", topk=topk, pooling="mean", max_len=LONGEST + 2, batch_size=8, dropout="0"
    )
    model = stages.model.build(data, tree, config).eval()
    with torch.no_grad():
        for head in model.heads:
            head.weight.normal_()
    return SimpleNamespace(data=data, model=model, config=config)


def check_documents_keep_their_places() -> None:
    """What is predicted of document i stands in row i."""
    here = made_up()

    def count_tokens(batch: "stages.data.Batch", k: int) -> dict[str, np.ndarray]:
        return {"tokens": batch.mask_BT.sum(1).numpy()}

    found = stages.train.predict_split(here.model, here.data, "test", 22, 8, count_tokens, k=1)
    expected = np.diff(here.data.splits["test"].offsets) + 2  # with [CLS] and [SEP]
    assert (found["tokens"] == expected).all()


def check_predictions_do_not_look_at_the_answer() -> None:
    """Other correct labels, and the same texts: the same predictions."""
    here = made_up()
    batch = here.data.batch("test", np.arange(40), 22)
    other_answers = batch._replace(label_P=(batch.label_P + 7) % N_LABELS)
    labels, _ = here.model.predict(batch, 5)
    others, _ = here.model.predict(other_answers, 5)
    assert torch.equal(labels, others)


def check_every_label_of_a_batch_is_trained() -> None:
    """Rows begin at zero. After one step, the rows of the batch's labels are not zero any more."""
    here = made_up(topk="4,8")  # every cluster is kept: no label is out of reach
    label_head = here.model.heads[-1]
    with torch.no_grad():
        label_head.weight.zero_()
    optimizer = RowAdam([{"params": [label_head.weight, label_head.bias], "lr": 1e-2}])
    batch = here.data.batch("train", np.arange(64), 22)
    losses, _ = here.model.loss(batch)
    losses.sum().backward()
    optimizer.step()
    weight_SD = label_head.weight.detach().flatten(0, 1)
    rows = weight_SD[here.model.label_to_slot[batch.label_P.unique()]]
    assert (rows != 0).any(dim=1).all()


def check_padding_does_not_change_a_feature() -> None:
    """A short document alone has the feature that it has beside a long one."""
    here = made_up()
    length = np.diff(here.data.splits["test"].offsets)
    shortest = length.argmin()
    longest = length.argmax()
    alone = here.data.batch("test", np.array([shortest]), 22)
    together = here.data.batch("test", np.array([shortest, longest]), 22)
    with torch.no_grad():
        expected = here.model.pooled(alone)[0]
        found = here.model.pooled(together)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def check_propensities_come_from_training_documents() -> None:
    """The table's row is the one that training counts give."""
    here = made_up()
    split = here.data.splits["test"]
    config = stages.eval.Config(k=5)
    labels = np.tile(np.arange(5), (40, 1))
    beam = {f"labels {name}": labels for name in stages.model.RANKINGS}
    found = stages.eval.Predictions(beam, 1.0, None, None, labels, np.zeros((40, 5)))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        stages.eval.print_table(config, here.data, found, "label")
    train = here.data.splits["train"]
    count_L = np.bincount(train.labels, minlength=N_LABELS)
    weight_L = stages.eval.inverse_propensity(count_L, len(train))
    expected = stages.eval.row("cascade, p(label) *", stages.eval.metrics(labels, split, weight_L))
    assert expected in printed.getvalue()


def check_the_shortlist_keeps_the_best() -> None:
    """Of four clusters, the two with the highest logits; in training, the correct one first."""
    logits = torch.tensor([[[0.0, 2.0, -1.0, 1.0]]])
    targets = torch.tensor([[[0.0, 0.0, 1.0, 0.0]]])
    best = stages.model.shortlist(logits, None, 2)
    assert set(best[0].tolist()) == {1, 3}
    with_teacher = stages.model.shortlist(logits, targets, 2)
    assert set(with_teacher[0].tolist()) == {1, 2}


def check_documents_without_labels_do_not_count() -> None:
    """Twenty more documents, none with a label: no metric changes."""
    split = made_up_split(40, seed=0)
    offsets = np.append(split.offsets, [split.offsets[-1]] * 20)
    label_offsets = np.append(split.label_offsets, [split.label_offsets[-1]] * 20)
    longer = stages.data.Split(split.ids, offsets, split.labels, label_offsets)
    labels = np.random.default_rng(1).integers(0, N_LABELS, (60, 5))
    weight_L = np.ones(N_LABELS)
    before = stages.eval.metrics(labels[:40], split, weight_L)
    after = stages.eval.metrics(labels, longer, weight_L)
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values)


def check_a_feature_that_wakes_up_takes_no_large_steps() -> None:
    """A feature is zero in the first step, and small after it. Its weights stay as small as others.

    Twenty steps of RowAdam over one cluster of four labels, with random gradients of the logits.
    """
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(1, 4, 8))
    optimizer = RowAdam([{"params": [weight], "lr": 1e-2}])
    for step in range(20):
        x_BD = torch.randn(16, 8)
        x_BD[:, 0] *= 0.0 if step == 0 else 1e-3
        dz_BKF = torch.randn(16, 1, 4) / 16
        clusters_BK = torch.zeros(16, 1, dtype=torch.long)
        weight.factors = [Factors(clusters_BK, dz_BKF, x_BD, n_clusters=1)]
        optimizer.step()
    largest_D = weight.detach().abs().amax((0, 1))
    assert largest_D[0] < 3 * largest_D[1:].max()


CHECKS = {
    "01_close_to_guessing": check_documents_keep_their_places,
    "02_better_than_everything": check_predictions_do_not_look_at_the_answer,
    "03_labels_that_do_not_learn": check_every_label_of_a_batch_is_trained,
    "04_the_size_of_a_batch": check_padding_does_not_change_a_feature,
    "05_three_columns": check_propensities_come_from_training_documents,
    "06_the_best_loss": check_the_shortlist_keeps_the_best,
    "07_the_same_factor": check_documents_without_labels_do_not_count,
    "08_weights_that_grow": check_a_feature_that_wakes_up_takes_no_large_steps,
}


def failing() -> list[str]:
    """The bugs whose check fails on this code."""
    names = []
    for name, check in CHECKS.items():
        try:
            check()
        except AssertionError:
            names.append(name)
    return names


if __name__ == "__main__":
    found = failing()
    for name, check in CHECKS.items():
        print(f"{'FAILS' if name in found else 'holds':7}{check.__name__}")
