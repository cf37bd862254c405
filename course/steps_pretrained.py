"""The steps of lab 5. Oracles: Encoder.forward of stage 3, and center and set_prior of stage 4.

Shapes   B and N documents, T tokens, H hidden states, D width, P (document, node) pairs, C nodes
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from course.steps import Case, Mistake, Sign, Step
from plumbing.stages import load_stages

stages = load_stages()
numbers = np.random.default_rng(0)
# By names of their own: lab 5 puts a student's functions in the place of these two.
center = stages.train.center
set_prior = stages.train.set_prior

# Step 1
HIDDEN = torch.from_numpy(numbers.normal(size=(3, 5, 4)).astype(np.float32))
# Documents of different lengths: with equal ones padding could not be noticed.
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])


def mean_of_tokens(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Stage 3's pooling, of an encoder whose only hidden state is given."""

    def backbone(**inputs) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=[hidden_BTD])

    encoder = SimpleNamespace(backbone=backbone, pooling="mean")
    return stages.model.Encoder.forward(encoder, None, mask_BT, {0})[0]


def with_padding(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    return hidden_BTD.mean(dim=1)


def over_the_longest(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Padding adds nothing, and the sum is divided by T all the same."""
    return (hidden_BTD * mask_BT[..., None]).mean(dim=1)


def summed(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    return (hidden_BTD * mask_BT[..., None]).sum(dim=1)


def first_token(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    return hidden_BTD[:, 0]


MEAN_OF_TOKENS = Step(
    name="mean_of_tokens",
    oracle=mean_of_tokens,
    cases=[Case("3 documents of 5, 2 and 3 tokens, width 4", (HIDDEN, MASK))],
    mistakes=[
        Mistake(
            with_padding,
            "the padding counts: a document's feature would depend on how long its neighbours are",
        ),
        Mistake(over_the_longest, "divide by the tokens of the document, not by T"),
        Mistake(summed, "this is the sum: a long document would have a long feature"),
        Mistake(first_token, "this is the first token; here the mean is asked for"),
    ],
    hint="the sum over tokens of hidden * mask, over the sum of the mask",
    tolerance=1e-5,
)

# Step 2. Of the three hidden states one is the same for all documents, and one has a dead feature.
ENCODED = numbers.normal(loc=2, scale=[[[1.0]], [[5.0]], [[1.0]]], size=(3, 40, 4))
ENCODED = ENCODED.transpose(1, 0, 2).astype(np.float32)
ENCODED[:, 0, 1] = 0
ENCODED[:, 2] = 3


def centre_and_scale(encoded_NHD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stage 4's `center`, of a model that has nothing else."""
    _, n_hidden, width = encoded_NHD.shape
    model = SimpleNamespace(
        hidden=list(range(n_hidden)),
        center_HD=torch.zeros(n_hidden, width),
        scale_H=torch.ones(n_hidden),
    )
    center(model, encoded_NHD)
    return model.center_HD.numpy(), model.scale_H.numpy()


def variance_itself(encoded_NHD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    centre_HD, scale_H = centre_and_scale(encoded_NHD)
    return centre_HD, scale_H**2


def spread_itself(encoded_NHD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    centre_HD, scale_H = centre_and_scale(encoded_NHD)
    return centre_HD, 1 / scale_H


def spread_around_zero(encoded_NHD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The size of the features themselves, before anything is taken away."""
    centre_HD, _ = centre_and_scale(encoded_NHD)
    return centre_HD, 1 / np.sqrt((encoded_NHD.astype(np.float64) ** 2).mean(axis=(0, 2)))


def spread_around_one_mean(encoded_NHD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """numpy's standard deviation over documents and features at once."""
    with np.errstate(divide="ignore"):
        return encoded_NHD.mean(axis=0), 1 / encoded_NHD.std(axis=(0, 2))


def one_mean_for_all_features(encoded_NHD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    centre_HD, scale_H = centre_and_scale(encoded_NHD)
    mean_H1 = centre_HD.mean(axis=1, keepdims=True)
    return np.repeat(mean_H1, centre_HD.shape[1], axis=1), scale_H


def has_a_scale_for_each_feature(result: tuple, encoded_NHD: np.ndarray) -> bool:
    return np.asarray(result[1]).size == encoded_NHD[0].size


def has_infinity(result: tuple, *arguments) -> bool:
    return bool(np.isinf(np.asarray(result[1])).any())


def scale_of_noise(result: tuple, *arguments) -> bool:
    """A hidden state that never changes is blown up, by what rounding left of its spread."""
    return bool(np.asarray(result[1]).max() > 1e3)


ONE_SCALE = (
    "one scale for a hidden state, not for a feature: a feature that is always zero has no spread, "
    "and an infinite scale"
)
CENTRE_AND_SCALE = Step(
    name="centre_and_scale",
    oracle=centre_and_scale,
    cases=[
        Case("40 documents, 2 hidden states, width 4", (ENCODED[:, :2],)),
        Case("the same with a third one, equal for all documents", (ENCODED,)),
    ],
    mistakes=[
        Mistake(
            variance_itself,
            "the spread is the root of the variance",
        ),
        Mistake(
            spread_itself, "the features are multiplied by the scale: it is one over the spread"
        ),
        Mistake(
            spread_around_zero, "the spread is measured from the centre: take the mean away first"
        ),
        Mistake(
            spread_around_one_mean,
            "the spread is measured from the centre, which has a mean for each feature; x.std((0, "
            "2)) takes one mean for all of them",
        ),
        Mistake(one_mean_for_all_features, "the centre has a mean for each feature: (H, D)"),
    ],
    signs=[
        Sign(has_a_scale_for_each_feature, ONE_SCALE),
        Sign(has_infinity, "a hidden state that is the same for all documents keeps the scale 1"),
        Sign(scale_of_noise, "a hidden state that is the same for all documents keeps the scale 1"),
    ],
    hint="centre: the mean over axis 0; spread: the root of ((encoded - centre) ** 2).mean((0, 2))",
    # The stage sums squares in float64 and gives float32; a variance in two steps may differ more.
    tolerance=1e-4,
)

# Step 3. Document 0 has two labels below node 1; node 3 has no document, and node 0 has all.
DOCS = np.array([0, 0, 0, 1, 2, 2, 3, 4])
NODES = np.array([0, 1, 1, 0, 0, 2, 0, 0])


def log_odds(doc_P: np.ndarray, node_P: np.ndarray, n_documents: int, n_nodes: int) -> np.ndarray:
    """Stage 4's `set_prior`, of a model with a single level whose nodes are its labels."""
    bias = torch.zeros(n_nodes, 1)
    model = SimpleNamespace(
        slot_to_label=torch.zeros(1),  # says on which device the model is
        heads=[SimpleNamespace(bias=bias)],
        counts=[1, n_nodes],
        nodes=lambda label_P, t: label_P,
    )
    order = np.argsort(doc_P, kind="stable")
    per_document = np.bincount(doc_P, minlength=n_documents)
    ends = np.append(0, np.cumsum(per_document))
    split = stages.data.Split(None, np.arange(n_documents + 1), node_P[order], ends)
    set_prior(model, split)
    return bias[:, 0].numpy()


def count_of(doc_P: np.ndarray, node_P: np.ndarray, n_nodes: int) -> np.ndarray:
    pairs = set(zip(doc_P.tolist(), node_P.tolist(), strict=True))
    return np.bincount([node for _, node in pairs], minlength=n_nodes)


def every_pair(doc_P: np.ndarray, node_P: np.ndarray, n_documents: int, n_nodes: int) -> np.ndarray:
    count_C = np.bincount(node_P, minlength=n_nodes)
    return np.log((count_C + 0.5) / np.maximum(n_documents - count_C + 0.5, 0.5))


def every_pair_as_it_comes(doc_P, node_P, n_documents: int, n_nodes: int) -> np.ndarray:
    count_C = np.bincount(node_P, minlength=n_nodes)
    return np.log((count_C + 0.5) / (n_documents - count_C + 0.5))


def log_of_the_share(doc_P, node_P, n_documents: int, n_nodes: int) -> np.ndarray:
    return np.log((count_of(doc_P, node_P, n_nodes) + 0.5) / (n_documents + 1))


def odds_against(doc_P, node_P, n_documents: int, n_nodes: int) -> np.ndarray:
    return -log_odds(doc_P, node_P, n_documents, n_nodes)


def is_too_short(result: np.ndarray, doc_P, node_P, n_documents: int, n_nodes: int) -> bool:
    return len(result) < n_nodes


def odds_without_logarithm(doc_P, node_P, n_documents: int, n_nodes: int) -> np.ndarray:
    return np.exp(log_odds(doc_P, node_P, n_documents, n_nodes))


def has_no_half(result: np.ndarray, *arguments) -> bool:
    return bool(np.isinf(np.asarray(result)).any())


LOG_ODDS = Step(
    name="log_odds",
    oracle=log_odds,
    cases=[Case("5 documents, 8 pairs, 4 nodes", (DOCS, NODES, 5, 4))],
    mistakes=[
        Mistake(every_pair, "a document with two labels below a node counts once"),
        Mistake(every_pair_as_it_comes, "a document with two labels below a node counts once"),
        Mistake(
            log_of_the_share,
            "odds: those that have one over those that have none, not over all documents",
        ),
        Mistake(odds_against, "upside down: a frequent node has a large bias"),
        Mistake(odds_without_logarithm, "the logarithm of the odds: a bias is a logit"),
    ],
    signs=[
        Sign(is_too_short, "a node without documents is missing: np.bincount(..., minlength=n)"),
        Sign(has_no_half, "half a document more above and below: no logarithm of 0"),
    ],
    hint="np.unique of the pairs, np.bincount of their nodes, then log((n + 0.5) / (N - n + 0.5))",
    tolerance=1e-5,
)

STEPS = [MEAN_OF_TOKENS, CENTRE_AND_SCALE, LOG_ODDS]
