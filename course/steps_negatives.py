"""The steps of lab 4. Oracles: Cascade.level_loss, shortlist and choose_layers of stage 3.

Shapes   B documents, K clusters kept one level up, F children of each
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from course.steps import Case, Mistake, Sign, Step
from plumbing.stages import load_stages

model_stage = load_stages().model
numbers = torch.Generator().manual_seed(0)

# Step 1
LOGITS = torch.randn(3, 2, 4, generator=numbers) * 2
TARGETS = (torch.rand(3, 2, 4, generator=numbers) < 0.3).float()
# An empty slot: minus infinity, which turns a product with 0 into no number.
WITH_EMPTY = LOGITS.clone()
WITH_EMPTY[:, 1, 3] = -torch.inf
TARGETS_WITH_EMPTY = TARGETS.clone()
TARGETS_WITH_EMPTY[:, 1, 3] = 0


def level_loss(logits_BKF: Tensor, targets_BKF: Tensor) -> Tensor:
    """The method of the cascade, which asks nothing of the cascade itself."""
    return model_stage.Cascade.level_loss(None, logits_BKF, targets_BKF)


def mean_over_candidates(logits_BKF: Tensor, targets_BKF: Tensor) -> Tensor:
    return level_loss(logits_BKF, targets_BKF) / logits_BKF[0].numel()


def sum_over_documents(logits_BKF: Tensor, targets_BKF: Tensor) -> Tensor:
    return level_loss(logits_BKF, targets_BKF) * len(logits_BKF)


def other_sign(logits_BKF: Tensor, targets_BKF: Tensor) -> Tensor:
    return level_loss(logits_BKF, 1 - targets_BKF)


def over_all_as_one_choice(logits_BKF: Tensor, targets_BKF: Tensor) -> Tensor:
    """The softmax cross-entropy, as if a document had one label."""
    chances = functional.log_softmax(logits_BKF.flatten(1), dim=1)
    return -(chances * targets_BKF.flatten(1)).sum() / len(logits_BKF)


def is_no_number(result: Tensor, *arguments) -> bool:
    return bool(torch.as_tensor(result).isnan().any())


LEVEL_LOSS = Step(
    name="level_loss",
    oracle=level_loss,
    cases=[
        Case("3 documents, 2 x 4 candidates", (LOGITS, TARGETS)),
        Case("the same with an empty slot", (WITH_EMPTY, TARGETS_WITH_EMPTY)),
    ],
    mistakes=[
        Mistake(
            mean_over_candidates,
            "summed over a document's candidates: with a mean, a level that scores more candidates "
            "would give each of them less weight",
        ),
        Mistake(sum_over_documents, "averaged over the documents: divide by B"),
        Mistake(other_sign, "softplus(z) - y z: 0 and 1 are exchanged"),
        Mistake(
            over_all_as_one_choice,
            "this is the softmax's loss, for one correct class; here every node is a yes or no",
        ),
    ],
    signs=[
        Sign(
            is_no_number,
            "0 times -inf is no number: torch.where(targets_BKF > 0, logits_BKF, 0.0) takes the "
            "logits of correct nodes alone",
        ),
    ],
    hint="(softplus(z) - y z).sum() / B",
    tolerance=1e-5,
)

# Step 2. A random shortlist is stage 3's shortlist of noise, in the place of logits.
NOISE = torch.randn(4, 3, 4, generator=numbers)
CORRECT = (torch.rand(4, 3, 4, generator=numbers) < 0.25).float()
KEEP_FIVE = (NOISE, CORRECT, 5)


def by_place(found: Tensor) -> np.ndarray:
    """The order of the places does not matter."""
    return np.sort(torch.as_tensor(found).numpy(), axis=1)


def random_alone(noise_BKF: Tensor, targets_BKF: Tensor, k: int) -> Tensor:
    return model_stage.shortlist(noise_BKF, None, k)


def wrong_ones_first(noise_BKF: Tensor, targets_BKF: Tensor, k: int) -> Tensor:
    return model_stage.shortlist(noise_BKF, 1 - targets_BKF, k)


def raised_by_one(noise_BKF: Tensor, targets_BKF: Tensor, k: int) -> Tensor:
    return model_stage.shortlist(noise_BKF + targets_BKF, None, k)


def all_correct_alike(noise_BKF: Tensor, targets_BKF: Tensor, k: int) -> Tensor:
    """As `score + 1e9 * targets` in float32, or torch.where(targets, inf, noise), does."""
    score_BKF = torch.where(targets_BKF > 0, torch.inf, noise_BKF)
    return score_BKF.flatten(1).topk(k).indices


def is_there_twice(result: Tensor, *arguments) -> bool:
    return any(len(row.unique()) < len(row) for row in torch.as_tensor(result))


RANDOM_SHORTLIST = Step(
    name="random_shortlist",
    oracle=model_stage.shortlist,
    cases=[
        Case("4 documents, 3 x 4 candidates, keep 5", KEEP_FIVE),
        # Fewer places than some documents have correct candidates: the noise decides among those.
        Case("the same, keep 2", (NOISE, CORRECT, 2)),
    ],
    mistakes=[
        Mistake(random_alone, "correct candidates go first: add something to their noise"),
        Mistake(wrong_ones_first, "these are the wrong candidates first"),
        Mistake(
            raised_by_one,
            "noise has no bounds, so 1 more does not put a candidate first; its sigmoid is between "
            "0 and 1",
        ),
        Mistake(
            all_correct_alike,
            "all correct candidates have the same score here: add the bonus to the sigmoid of the "
            "noise, so that the noise still decides among them (a bonus of a billion would swallow "
            "it)",
        ),
    ],
    signs=[Sign(is_there_twice, "a place is there twice: its labels would be trained twice")],
    hint="a score (B, K, F) that is larger for correct candidates than for any other, then "
    ".flatten(1).topk(k, dim=1)",
    view=by_place,
)

# Step 3


def nearest(depth: int, n_levels: int) -> list[list[int]]:
    """Without the second layer of the coarsest level."""
    return [[group[-1]] for group in model_stage.choose_layers(depth, n_levels)]


def fine_to_coarse(depth: int, n_levels: int) -> list[list[int]]:
    return model_stage.choose_layers(depth, n_levels)[::-1]


def is_cut_off(layers: list[list[int]], depth: int, n_levels: int) -> bool:
    """Each level reads the right layer, or the one below it."""
    right = model_stage.choose_layers(depth, n_levels)
    last = zip(layers, right, strict=True)
    return all(right_group[-1] - group[-1] in (0, 1) for group, right_group in last)


def down_to_the_embeddings(depth: int, n_levels: int) -> list[list[int]]:
    """The coarsest level reads the layer before even if that is number 0."""
    layers = model_stage.choose_layers(depth, n_levels)
    if len(layers[0]) == 1 and n_levels > 1:
        layers[0].insert(0, layers[0][0] - 1)
    return layers


LAYERS = Step(
    name="choose_layers",
    oracle=model_stage.choose_layers,
    cases=[
        Case("12 layers, 3 levels", (12, 3)),
        Case("12 layers, 4 levels", (12, 4)),
        Case("4 layers, 3 levels", (4, 3)),
        # So few layers that every level would like to read a layer below the first.
        Case("1 layer, 3 levels", (1, 3)),
        Case("1 layer, 5 levels", (1, 5)),
        Case("6 layers, 1 level", (6, 1)),
    ],
    mistakes=[
        Mistake(nearest, "the coarsest level reads two layers: its own and the one before"),
        Mistake(fine_to_coarse, "coarse to fine: the last level reads the last layer"),
        Mistake(down_to_the_embeddings, "hidden state 0 is the embeddings: layers begin at 1"),
    ],
    signs=[Sign(is_cut_off, "rounded to the nearest layer: int(x + 0.5), not int(x)")],
    hint="level `level` is n_levels - 1 - level levels above the labels",
)

STEPS = [LEVEL_LOSS, RANDOM_SHORTLIST, LAYERS]
