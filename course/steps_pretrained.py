"""The steps of lab 5. Oracles: Encoder.forward of stage 3, and center and set_prior of stage 4.

Shapes   B and N documents, T tokens, H hidden states, D width, P (document, node) pairs, C nodes
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from course.steps import Case, Mistake, Sign, Step
from plumbing.stages import load_stages

stages = load_stages()
numbers = np.random.default_rng(0)
# By names of their own: lab 5 puts a student's functions in the place of these two.
center = stages.train.center
set_prior = stages.train.set_prior

# Step 1. The first case can be followed by hand. It has one document, so that it cannot tell whose
# tokens are counted; the second one can.
ONE_DOCUMENT = (
    torch.tensor([[[1.0, 8.0], [3.0, 4.0], [2.0, 3.0], [9.0, 9.0], [7.0, 7.0]]]),
    torch.tensor([[1, 1, 1, 0, 0]]),
)
HIDDEN = torch.from_numpy(numbers.normal(size=(3, 5, 4)).astype(np.float32))
# Documents of different lengths: with equal ones padding could not be noticed.
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])


def mean_of_tokens(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Stage 3's pooling, of an encoder whose only hidden state is given."""

    # Stands where the stage expects a transformer, which would have to read token ids.
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


def over_the_batch(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    return summed(hidden_BTD, mask_BT) / mask_BT.sum()


def padding_alone(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """The mask taken the other way round, as some libraries mark padding with 1."""
    return mean_of_tokens(hidden_BTD, 1 - mask_BT)


def largest(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    is_padding_BT1 = mask_BT[..., None] == 0
    return hidden_BTD.masked_fill(is_padding_BT1, -torch.inf).amax(dim=1)


def at_length_1(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """As sentence-transformers gives the features of this very encoder."""
    return functional.normalize(mean_of_tokens(hidden_BTD, mask_BT), dim=1)


def has_no_tokens_left(result: Tensor, hidden_BTD: Tensor, mask_BT: Tensor) -> bool:
    """Documents are gone: all tokens of the batch were put into one list."""
    return torch.as_tensor(result).shape == hidden_BTD.shape[2:]


def has_tokens(result: Tensor, hidden_BTD: Tensor, mask_BT: Tensor) -> bool:
    """The mean was taken over the features, so that each token has a number."""
    return torch.as_tensor(result).shape == hidden_BTD.shape[:2]


MEAN_OF_TOKENS = Step(
    name="mean_of_tokens",
    oracle=mean_of_tokens,
    cases=[
        Case("1 document: tokens (1 8) (3 4) (2 3), then padding (9 9) (7 7)", ONE_DOCUMENT),
        Case("3 documents of 5, 2 and 3 tokens, width 4", (HIDDEN, MASK)),
    ],
    mistakes=[
        Mistake(
            with_padding,
            "the padding counts: a document's feature would depend on how long its neighbours are",
        ),
        Mistake(over_the_longest, "divide by the tokens of the document, not by T"),
        Mistake(summed, "this is the sum: a long document would have a long feature"),
        Mistake(first_token, "this is the first token; here the mean is asked for"),
        Mistake(over_the_batch, "divide by the tokens of each document, not by those of the batch"),
        Mistake(padding_alone, "this is the mean of the padding: mask_BT is 1 where a token is"),
        Mistake(largest, "this is the largest number of each feature; the mean is asked for"),
        Mistake(at_length_1, "the mean as it is, not brought to length 1"),
    ],
    signs=[
        Sign(
            has_no_tokens_left,
            "hidden_BTD[mask] puts the tokens of all documents into one list: each document needs "
            "a mean of its own",
        ),
        Sign(has_tokens, "this is the mean over the features; T, the tokens, is axis 1"),
    ],
    hint="a token that is not there adds 0 to the sum, and 0 to the number of tokens. Do the "
    "shapes meet? mask_BT[:, :, None] is (B, T, 1), and sum(dim=1, keepdim=True) keeps an axis",
    tolerance=1e-5,
)

# Step 2. The first case can be followed by hand: the squared distances are 1, 49, 1 and 49.
BY_HAND = np.array([[[1.0, 0.0]], [[3.0, 14.0]]], np.float32)
# Of the three hidden states one is the same for all documents, and one has a dead feature.
ENCODED = numbers.normal(loc=2, scale=[[[1.0]], [[5.0]], [[1.0]]], size=(3, 40, 4))
ENCODED = ENCODED.transpose(1, 0, 2).astype(np.float32)
ENCODED[:, 0, 1] = 0
ENCODED[:, 2] = 3
# Rounding is in proportion to the numbers: the variance of these is 0.000025, and their mean square
# is 100. Whoever asks for a variance of 0, or compares it with a constant, does not notice it.
ROUNDED = numbers.normal(loc=10, scale=0.005, size=(40, 1, 4)).astype(np.float32)


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


def summed_over_features(encoded_NHD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean length of a centred feature: it grows with the width."""
    centre_HD, scale_H = centre_and_scale(encoded_NHD)
    return centre_HD, scale_H / np.sqrt(encoded_NHD.shape[2])


def mean_of_distances(encoded_NHD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    centre_HD, _ = centre_and_scale(encoded_NHD)
    with np.errstate(divide="ignore"):
        return centre_HD, 1 / np.abs(encoded_NHD - centre_HD).mean(axis=(0, 2))


def mean_of_spreads(encoded_NHD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The root of each feature's variance, and then their mean."""
    centre_HD, _ = centre_and_scale(encoded_NHD)
    with np.errstate(divide="ignore"):
        return centre_HD, 1 / encoded_NHD.std(axis=0).mean(axis=1)


def scaled_centre(encoded_NHD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    centre_HD, scale_H = centre_and_scale(encoded_NHD)
    return centre_HD * scale_H[:, None], scale_H


def one_mean_for_all_features(encoded_NHD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    centre_HD, scale_H = centre_and_scale(encoded_NHD)
    mean_H1 = centre_HD.mean(axis=1, keepdims=True)
    return np.repeat(mean_H1, centre_HD.shape[1], axis=1), scale_H


def is_exchanged(result: tuple, *arguments) -> bool:
    scale, centre = result
    return np.ndim(scale) == 1 and np.ndim(centre) == 2


def is_features(result: tuple, encoded_NHD: np.ndarray) -> bool:
    """The centred features themselves, in place of what is taken away from them."""
    return np.shape(result[0]) == encoded_NHD.shape


def has_a_scale_for_each_feature(result: tuple, encoded_NHD: np.ndarray) -> bool:
    return np.asarray(result[1]).size == encoded_NHD[0].size


def scales_what_never_changes(result: tuple, encoded_NHD: np.ndarray) -> bool:
    """A hidden state that is the same for all documents got another scale than 1."""
    _, right_H = centre_and_scale(encoded_NHD)
    is_constant_H = right_H == 1
    return bool((np.asarray(result[1])[is_constant_H] != 1).any())


ONE_SCALE = (
    "one scale for a hidden state, not for a feature: a feature that is always zero has no spread, "
    "and an infinite scale"
)
ROOT_LAST = "squares first, then their mean over documents and features, and then one root"
CENTRE_AND_SCALE = Step(
    name="centre_and_scale",
    oracle=centre_and_scale,
    cases=[
        Case("2 documents, (1 0) and (3 14); 1 hidden state, width 2", (BY_HAND,)),
        Case("40 documents, 2 hidden states, width 4", (ENCODED[:, :2],)),
        Case("the same with a third one, equal for all documents", (ENCODED,)),
        Case("40 documents, 1 hidden state, width 4, all numbers 10 up to rounding", (ROUNDED,)),
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
        Mistake(
            summed_over_features,
            "the mean over the features as well, not their sum: the spread should not grow with "
            "the width",
        ),
        Mistake(mean_of_distances, ROOT_LAST),
        Mistake(mean_of_spreads, ROOT_LAST),
        Mistake(scaled_centre, "the centre is taken away before anything is multiplied"),
        Mistake(one_mean_for_all_features, "the centre has a mean for each feature: (H, D)"),
    ],
    signs=[
        Sign(is_exchanged, "the centre first, then the scale"),
        Sign(is_features, "return what is taken away, not the features from which it is taken"),
        Sign(has_a_scale_for_each_feature, ONE_SCALE),
        Sign(
            scales_what_never_changes,
            "a hidden state that is the same for all documents, up to rounding, keeps the scale 1: "
            "compare its variance, the square of the spread, with the mean of encoded ** 2",
        ),
    ],
    hint="the centre is a mean over axis 0, the documents; the spread is measured from it, over "
    "axes 0 and 2",
    # The stage sums squares in float64 and gives float32; a variance in two steps may differ more.
    tolerance=1e-4,
)

# Step 3. The first case can be followed by hand. Documents, documents with labels, and pairs differ
# in number, so that it shows which of them somebody has taken.
FOUR_PAIRS = (np.array([0, 1, 1, 2]), np.array([0, 0, 1, 1]), 6, 3)
# Document 0 has two labels below node 1, and they do not stand side by side: whoever compares
# neighbours alone counts it twice. Node 3 has no document, and node 0 has all.
DOCS = np.array([0, 0, 0, 1, 2, 2, 3, 4])
NODES = np.array([1, 0, 1, 0, 0, 2, 0, 0])


def log_odds(doc_P: np.ndarray, node_P: np.ndarray, n_documents: int, n_nodes: int) -> np.ndarray:
    """Stage 4's `set_prior`, of a model with a single level whose nodes are its labels."""
    bias = torch.zeros(n_nodes, 1)
    model = SimpleNamespace(
        slot_to_label=torch.zeros(1),  # says on which device the model is
        heads=[SimpleNamespace(bias=bias)],
        counts=[1, n_nodes],
        nodes=lambda label_P, t: label_P,
    )
    # A split of stage 1 says where each document's labels end, so its pairs are sorted by document.
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
    # A node may have more pairs than there are documents: no logarithm of a negative number.
    return np.log((count_C + 0.5) / np.maximum(n_documents - count_C + 0.5, 0.5))


def every_pair_as_it_comes(doc_P, node_P, n_documents: int, n_nodes: int) -> np.ndarray:
    count_C = np.bincount(node_P, minlength=n_nodes)
    return np.log((count_C + 0.5) / (n_documents - count_C + 0.5))


def log_of_the_share(more: float) -> Callable:
    """`more` than N below: with half a document for each side it is 1."""

    def wrong(doc_P, node_P, n_documents: int, n_nodes: int) -> np.ndarray:
        return np.log((count_of(doc_P, node_P, n_nodes) + 0.5) / (n_documents + more))

    return wrong


def odds_against(doc_P, node_P, n_documents: int, n_nodes: int) -> np.ndarray:
    return -log_odds(doc_P, node_P, n_documents, n_nodes)


def is_too_short(result: np.ndarray, doc_P, node_P, n_documents: int, n_nodes: int) -> bool:
    return len(result) < n_nodes


def odds_without_logarithm(doc_P, node_P, n_documents: int, n_nodes: int) -> np.ndarray:
    return np.exp(log_odds(doc_P, node_P, n_documents, n_nodes))


def with_other_logarithm(base: float) -> Callable:
    def wrong(doc_P, node_P, n_documents: int, n_nodes: int) -> np.ndarray:
        return log_odds(doc_P, node_P, n_documents, n_nodes) / np.log(base)

    return wrong


def share_itself(doc_P, node_P, n_documents: int, n_nodes: int) -> np.ndarray:
    return count_of(doc_P, node_P, n_nodes) / n_documents


def each_node_once(doc_P, node_P, n_documents: int, n_nodes: int) -> np.ndarray:
    """As `count_C[node_P] += 1` counts: numpy adds 1 once, however often a node is named."""
    return log_odds(np.zeros_like(node_P), node_P, n_documents, n_nodes)


def of_pairs(doc_P, node_P, n_documents: int, n_nodes: int) -> np.ndarray:
    return log_odds(doc_P, node_P, len(doc_P), n_nodes)


def of_documents_with_labels(doc_P, node_P, n_documents: int, n_nodes: int) -> np.ndarray:
    return log_odds(doc_P, node_P, len(np.unique(doc_P)), n_nodes)


def with_shares(above: float, below: float) -> Callable:
    """Other parts of a document than half of one, above and below."""

    def wrong(doc_P, node_P, n_documents: int, n_nodes: int) -> np.ndarray:
        count_C = count_of(doc_P, node_P, n_nodes)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log((count_C + above) / (n_documents - count_C + below))

    return wrong


def has_no_half(result: np.ndarray, *arguments) -> bool:
    return bool(np.isinf(np.asarray(result)).any())


HALF = "half a document more above and below: no logarithm of 0"
NOT_OVER_ALL = "odds: those that have one over those that have none, not over all documents"
LOGARITHM = "the natural logarithm, np.log: the sigmoid has e"
LOG_ODDS = Step(
    name="log_odds",
    oracle=log_odds,
    cases=[
        Case("6 documents, 3 nodes; documents 0 1 below node 0, 1 2 below node 1", FOUR_PAIRS),
        Case("5 documents, 8 pairs, 4 nodes; two pairs are the same", (DOCS, NODES, 5, 4)),
        Case("the same with a sixth document, which has no labels", (DOCS, NODES, 6, 4)),
    ],
    mistakes=[
        Mistake(every_pair, "a document with two labels below a node counts once"),
        Mistake(every_pair_as_it_comes, "a document with two labels below a node counts once"),
        Mistake(log_of_the_share(0), NOT_OVER_ALL),
        Mistake(log_of_the_share(0.5), NOT_OVER_ALL),
        Mistake(log_of_the_share(1), NOT_OVER_ALL),
        Mistake(odds_against, "upside down: a frequent node has a large bias"),
        Mistake(odds_without_logarithm, "the logarithm of the odds: a bias is a logit"),
        Mistake(share_itself, "a share is a probability; a bias is a logit: log odds"),
        Mistake(with_other_logarithm(2), LOGARITHM),
        Mistake(with_other_logarithm(10), LOGARITHM),
        Mistake(
            each_node_once,
            "a node that several documents have got 1 alone: count[node_P] += 1 adds 1 once, "
            "however often node_P names it; np.bincount counts",
        ),
        Mistake(of_documents_with_labels, "documents without labels count, too: n_documents"),
        Mistake(of_pairs, "those that have none: of the documents, not of the pairs"),
        Mistake(with_shares(0.5, 0), HALF),
        Mistake(
            with_shares(0.5, -0.5),
            "half a document more below as well: is it taken away there? n - count + 0.5",
        ),
        Mistake(with_shares(1, 1), "half a document more, not a whole one"),
    ],
    signs=[
        Sign(is_too_short, "a node without documents is missing: np.bincount(..., minlength=n)"),
        Sign(has_no_half, HALF),
    ],
    hint="first count, for each node, the documents that have it, each once (np.unique with axis=1 "
    "finds the different pairs); then the documents that do not have it",
    tolerance=1e-5,
)

STEPS = [MEAN_OF_TOKENS, CENTRE_AND_SCALE, LOG_ODDS]
