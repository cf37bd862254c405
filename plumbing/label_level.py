"""The label level: how it computes its logits, and how its weights learn. Stages 3 and 4 use it.

A label level has millions of weights: labels x width. A batch needs some of them, the clusters on
its shortlists. So a step should not pay for the others, and it should never hold a gradient as big
as the layer. This file does both: ShortlistProduct for the logits, RowAdam for the step. What they
compute is nothing special: 03_model.py has the plain form, and the tests compare.

Forward. The U clusters that the documents of a batch keep are a smaller dense layer, (U, F, D). One
product of the batch's features with it gives the logits (B, U, F), and every document picks its own
K clusters. This computes some logits that a document did not ask for. As soon as shortlists overlap
it is still cheaper than gathering weights for every document, which would be (B, K, F, D) numbers.

How large is U? 64 documents that keep 400 of 65,536 clusters each keep 25,600 together at most, and
fewer if their shortlists overlap. A CPU counts them. A GPU would have to be waited for, so there U
is the most that it can be. With 768 kept clusters this is 49,152, and then all clusters take part:
to read them in order is cheaper than to gather three quarters of them (ENOUGH). Whatever takes part
and was on no shortlist has the gradient 0, and stays as it is.

Backward. Let dz be the gradient of the logits, scattered into (B, U, F). Then

    the gradient of the features is  dz W       one more product with the same smaller layer
    the gradient of the weights is   dz^T x     as big as the smaller layer: it is never built

We keep the two factors dz and x. All that the optimiser wants to know of the gradient follows from
them, and the step itself is again one product, added to the weights in place, for some clusters at
a time. Batches whose gradients are added up (--accumulate) are one batch of all their documents:
their factors are put one below the other.

With several devices every process gets the factors of all, and makes the whole step itself.

Left out: label weights that are divided among devices; momentum, which would be a second number per
weight.
Shapes   B documents of a batch, D width, C clusters, F children of each (fan), K clusters kept for
         document, U clusters that take part in the batch, R rows (labels): U x F, or n x F of n
         clusters at a time
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from plumbing import several_devices

# Weights that are worked on at a time. On a CPU: as many as its caches hold.
CHUNK = {"cpu": 2**17, "cuda": 2**26}
# From this share of clusters on all of them take part: whoever takes all need not gather. On a GPU
# memory is what takes the time, and to gather is to read, write, and read again: three times as
# much as to read. On a CPU arithmetic is, and every cluster that nobody asked for costs it.
ENOUGH = {"cpu": 0.95, "cuda": 0.4}
BOUND = 30.0  # learning rates that a weight moves in one step at most; why 30: RowAdam
FLOOR = 1e-3  # of the mean: what is added to the squares of every feature


# 1. Which clusters take part.


def touched(clusters_BK: Tensor, n_clusters: int, wait: bool) -> tuple[Tensor | None, Tensor]:
    """(clusters (U,) that occur in the batch, place (B, K) of each document's clusters among them).

    From the share ENOUGH of the C clusters on, None stands for all of them, each at the place of
    its number.

    To count those that occur, one would have to wait for a GPU. Without `wait`, U is the most that
    there can be, min(B * K, C): the places left over are filled up with others.
    """
    enough = ENOUGH[clusters_BK.device.type] * n_clusters
    if wait:
        clusters_U, place_BK = clusters_BK.unique(return_inverse=True)
        if len(clusters_U) >= enough:
            return None, clusters_BK
        return clusters_U, place_BK
    most = min(clusters_BK.numel(), n_clusters)
    if most >= enough:
        return None, clusters_BK
    device = clusters_BK.device
    occurs_C = torch.zeros(n_clusters, dtype=torch.uint8, device=device)
    occurs_C.scatter_(0, clusters_BK.flatten(), 1)
    # The clusters that occur first, then the others, each group in ascending order.
    filled_C = occurs_C.argsort(descending=True, stable=True)
    place_C = torch.empty_like(filled_C)
    place_C.scatter_(0, filled_C, torch.arange(n_clusters, device=device))
    return filled_C[:most], place_C[clusters_BK]


def in_parts(clusters_U: Tensor | None, weight: Tensor) -> Iterator[slice | Tensor]:
    """The clusters, some at a time: their numbers, or a slice of them where all take part."""
    n = chunk_of(weight)
    if clusters_U is not None:
        yield from clusters_U.split(n)
        return
    for start in range(0, len(weight), n):
        yield slice(start, start + n)


def read(weight: Tensor, part: slice | Tensor) -> Tensor:
    """The rows of some clusters: of a slice a view, of numbers a copy."""
    if isinstance(part, slice):
        return weight[part]
    return weight.index_select(0, part)


def chunk_of(weight: Tensor) -> int:
    """How many clusters are worked on at a time: a multiple of 8, if there are so many.

    The rows of a product's matrices then begin at round addresses. A GPU needs that to be fast.
    """
    n = CHUNK[weight.device.type] // weight[0].numel()
    return n // 8 * 8 if n >= 8 else max(1, n)


# 2. The logits.


def product(x_BD: Tensor, weight_CFD: Tensor, bias_CF: Tensor) -> Tensor:
    """Logits (B, C, F) of all the clusters given: one product, in the precision of the weights.

    Of bfloat16 weights, a GPU adds up in float32 and gives that. A CPU rounds the logits, too.
    """
    weight_DR = weight_CFD.flatten(0, 1).T
    x_BD = x_BD.to(weight_CFD.dtype)
    if x_BD.is_cuda and x_BD.dtype == torch.bfloat16:
        logits_BR = torch.mm(x_BD, weight_DR, out_dtype=torch.float32)
    else:
        logits_BR = x_BD @ weight_DR
    return logits_BR.view(len(x_BD), *bias_CF.shape) + bias_CF


@dataclass
class Factors:
    """A gradient of the weights (C, F, D) as two factors, for the K clusters of each document.

    Of child f of cluster c: the sum of dz[b, k, f] x[b] over all b, k with clusters[b, k] = c.
    """

    clusters_BK: Tensor  # int64
    dz_BKF: Tensor  # float32, gradient of the logits
    x_BD: Tensor  # float32, input of the head
    n_clusters: int  # C

    @cached_property
    def touched(self) -> tuple[Tensor | None, Tensor]:
        """(clusters_U, place_BK), as the function `touched` says."""
        return touched(self.clusters_BK, self.n_clusters, wait=not self.x_BD.is_cuda)

    @cached_property
    def dz_BUF(self) -> Tensor:
        """The gradient of all logits (B, U, F): 0 where a document did not ask."""
        clusters_U, place_BK = self.touched
        n_documents, _, fan = self.dz_BKF.shape
        n_touched = self.n_clusters if clusters_U is None else len(clusters_U)
        index_BKF = place_BK[..., None].expand(-1, -1, fan)
        dz_BUF = self.dz_BKF.new_zeros(n_documents, n_touched, fan)
        return dz_BUF.scatter_add_(1, index_BKF, self.dz_BKF)


class ShortlistProduct(torch.autograd.Function):
    """Logits (B, K, F) of the children of each document's clusters (B, K).

    Backward leaves no .grad at weight (C, F, D) and bias (C, F). It leaves .factors, a list with
    one item per backward pass. Only RowAdam.step() uses it up.
    """

    @staticmethod
    def forward(ctx, x_BD: Tensor, weight: Tensor, bias: Tensor, clusters_BK: Tensor) -> Tensor:
        clusters_U, place_BK = touched(clusters_BK, len(weight), wait=not x_BD.is_cuda)
        ctx.save_for_backward(x_BD, clusters_BK, clusters_U, place_BK)
        # Not by save_for_backward, which gives back other tensors with the same memory: the factors
        # must be left at the very parameters that the optimiser holds.
        ctx.parameters = weight, bias
        logits = []
        for part in in_parts(clusters_U, weight):
            logits.append(product(x_BD, read(weight, part), read(bias, part)))
        # Every document picks the clusters that it asked for.
        logits_BUF = torch.cat(logits, dim=1)
        index_BKF = place_BK[..., None].expand(-1, -1, weight.shape[1])
        return logits_BUF.gather(1, index_BKF)

    @staticmethod
    def backward(ctx, dz_BKF: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, clusters_BK, clusters_U, place_BK = ctx.saved_tensors
        weight, bias = ctx.parameters
        factors = Factors(clusters_BK, dz_BKF, x_BD.detach(), len(weight))
        factors.touched = clusters_U, place_BK  # known already
        # 1. The gradient of the features, dz W.
        dx_BD = None
        if ctx.needs_input_grad[0]:  # features from a cache do not learn
            dx_BD = torch.zeros_like(x_BD)
            dz_parts = factors.dz_BUF.split(chunk_of(weight), 1)
            for part, dz_BnF in zip(in_parts(clusters_U, weight), dz_parts, strict=True):
                weight_RD = read(weight, part).flatten(0, 1)
                dx_BD += dz_BnF.flatten(1).to(weight.dtype) @ weight_RD
        # 2. The gradients of weight and bias stay factors.
        if ctx.needs_input_grad[1]:
            leave(weight, factors)
            leave(bias, factors)
        return dx_BD, None, None, None


def leave(parameter: Tensor, factors: Factors) -> None:
    """Add the factors of one backward pass to those that wait for RowAdam."""
    parameter.factors = [*getattr(parameter, "factors", []), factors]


# 3. What follows from the factors.


def one_batch(parts: list[Factors]) -> Factors:
    """The sum of several gradients, of this process and of others: one batch of all documents."""
    if len(parts) == 1 and several_devices.n_processes() == 1:
        return parts[0]
    clusters_BK = torch.cat([part.clusters_BK for part in parts])
    dz_BKF = torch.cat([part.dz_BKF for part in parts])
    x_BD = torch.cat([part.x_BD for part in parts])
    everything = several_devices.gather([clusters_BK, dz_BKF, x_BD])
    return Factors(*everything, parts[0].n_clusters)


def squares_of_features(dz_BUF: Tensor, x_BD: Tensor) -> Tensor:
    """(D,) squares of the gradient, summed over all rows.

    sum_r (sum_b dz_br x_bd)^2 = sum_ab x_ad (sum_r dz_ar dz_br) x_bd, where a and b are documents.
    The sum over rows, documents with documents, comes first: the gradient itself is not needed.
    """
    dz_BR = dz_BUF.flatten(1)
    between_BB = dz_BR @ dz_BR.T
    squares_D = (x_BD * (between_BB @ x_BD)).sum(0)
    return squares_D.clamp(min=0)  # rounding may go below zero


def squares_of_rows(dz_BR: Tensor, between_BB: Tensor) -> Tensor:
    """(R,) squares of the gradient, summed over all features: the same the other way round.

    `between_BB` is x x^T. A row whose documents nearly cancel gets little but rounding errors here.
    They decide nothing: RowAdam divides by the cap where that is larger, as it is then. (The error
    is below a millionth of (sum_b |dz_b| |x_b|)^2, with TF32 below a thousandth. Its root, as the
    mean over features, is smaller than the cap, which is a thirtieth of sum_b |dz_b| max_d |x_bd|.)
    """
    squares_R = (dz_BR * (between_BB @ dz_BR)).sum(0)
    return squares_R.clamp(min=0)


def bound_of_rows(dz_BR: Tensor, x_BD: Tensor) -> Tensor:
    """(R,): no entry of a row of the gradient is larger than this.

    The largest entry itself is known only when the gradient is built. This is the smaller of two
    bounds that follow from the factors:

    |sum_b dz_b x_bd| <= sum_b |dz_b| max_d |x_bd|     sharp if few documents pull at a row
    |sum_b dz_b x_bd| <= |dz| max_d |x_d|, lengths     sharp if many do (Cauchy, Schwarz)
    """
    largest_B = x_BD.abs().amax(1)
    by_few_R = largest_B @ dz_BR.abs()
    largest_length = torch.linalg.vector_norm(x_BD, dim=0).max()
    by_many_R = torch.linalg.vector_norm(dz_BR, dim=0) * largest_length
    return torch.minimum(by_few_R, by_many_R)


# 4. The step.


def round_stochastically(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """bfloat16 of float32, rounded up or down at random, so that the mean is right.

    Rounding to the nearest would lose every change of a weight by less than a five-hundredth of it.
    A bfloat16 is the upper half of a float32. Adding a random lower half carries into the upper one
    with just the probability that rounding needs.
    """
    noise = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    noise.random_(0, 1 << 16, generator=generator)
    upper_half = (values.view(torch.int32) + noise) & -(1 << 16)
    return upper_half.view(torch.float32).to(torch.bfloat16)


def noise_of_step(weight: Tensor, step: int) -> torch.Generator:
    """Randomness that depends on the step alone: several processes must round alike."""
    generator = torch.Generator(weight.device)
    generator.manual_seed(step)
    return generator


def add_product(
    weight: Tensor,
    part: slice | Tensor,
    left_RB: Tensor,
    right_BD: Tensor,
    noise: torch.Generator | None,
) -> None:
    """Add left @ right to the rows of some clusters, in place."""
    shape_nFD = (-1, *weight.shape[1:])
    if weight.dtype == torch.bfloat16:
        rows_RD = read(weight, part).view(-1, right_BD.shape[1]).float()
        rows_RD.addmm_(left_RB, right_BD)
        weight[part] = round_stochastically(rows_RD, noise).view(shape_nFD)
    elif isinstance(part, slice):
        weight[part].view(-1, right_BD.shape[1]).addmm_(left_RB, right_BD)
    else:
        weight.index_add_(0, part, (left_RB @ right_BD).view(shape_nFD))


class RowAdam(torch.optim.Optimizer):
    """Adam for the rows of labels. It reads and writes the clusters that the gradient names.

    Adam keeps a second moment for every weight. RowAdam keeps it as two factors (Adafactor, Shazeer
    and Stern 2018): one number per feature, f, and one per row, v. A step is

        f <- beta f + (1 - beta) sum_rows(g^2)        how large a feature's gradient is
        v <- beta v + (1 - beta) mean_features(g^2)   how large a row's gradient is
        c <- beta c + (1 - beta) 1                    how much of v has come together
        w <- w - lr g / sqrt(v / c * f / mean(f))

    v starts at 0, so it is too small in a row's first steps. c is too small by the same factor, and
    v / c is a true mean over the steps in which the row had a gradient. In f / mean(f) this factor
    cancels. A row without a gradient keeps its v, c and weights: an empty slot, or a label whose
    cluster no document keeps.

    f and v are updated first and divide afterwards: the divisor already contains the gradient of
    this very step. A feature that was always zero and has a gradient now gets f = (1 - beta) g^2 in
    the same step, and a row in its first step v / c = g^2. So neither takes a huge step.

    Two factors are not the whole second moment, though. A row whose gradient stands in features
    that are small everywhere else would still go far. So the step of every row is capped. After its
    features are divided, the gradient of a row has a largest entry. What the row is divided by is
    at least a BOUNDth of what this entry could be. So no weight moves further than BOUND learning
    rates. `bound_of_rows` looks at what the documents could add up to. In truth they cancel in
    part, so the cap also slows down rows that needed none.

    BOUND must let the rare labels learn. Take a label that one document in ten thousand has. In
    nearly all steps the gradient of its row is tiny. Then the document comes along with a gradient
    g, v / c becomes (1 - beta) g^2 = g^2 / 100, and the row moves 10 learning rates, as the root
    mean square over its weights. Its largest weight moves about three times as far, as the largest
    of some hundred random numbers does. 30 lets it. Adam does the same: torch's AdamW, whose second
    beta is 0.999 if one says nothing, moves a weight 32 learning rates, over the steps to come.

    There is no weight decay. It would be one more read and write of everything that takes part, and
    with the decay of the cluster levels nothing that was measured changed (bench/README.md).

    A feature may be dead: zero in every document. FLOOR keeps its scale finite, so that rounding
    noise is not blown up. bfloat16 is rounded stochastically.
    """

    def __init__(self, groups: list[dict], beta: float = 0.99) -> None:
        super().__init__(groups, {"lr": 1e-3})
        self.beta = beta
        if any(group.get("weight_decay") for group in self.param_groups):
            raise ValueError("RowAdam has no weight decay, expected weight_decay 0 in every group")

    @torch.no_grad()
    def step(self, scale: Tensor | float = 1.0) -> None:
        """One step; it uses the gradients up. `scale`: what the loss was multiplied by."""
        gradients: dict[int, Factors] = {}  # a weight and its bias have the same factors
        for group in self.param_groups:
            for weight in group["params"]:
                parts = weight.__dict__.pop("factors", [])
                if not parts:
                    continue
                key = id(parts[0])
                if key not in gradients:
                    gradients[key] = one_batch(parts)
                self.update(weight, gradients[key], scale, group["lr"])

    def update(
        self,
        weight: Tensor,
        gradient: Factors,
        scale: Tensor | float,
        lr: float,
    ) -> None:
        """One step of a weight (C, F, D), or of a bias (C, F), whose rows have a single feature."""
        clusters_U, _ = gradient.touched
        dz_BUF = gradient.dz_BUF
        x_BD = gradient.x_BD
        if weight.ndim == 2:
            # A bias is a weight whose only feature is 1 in every document.
            dz_BUF = dz_BUF.sum(0, keepdim=True)
            x_BD = x_BD.new_ones(1, 1)
        x_BD = x_BD / scale  # one factor divided by it is the whole gradient divided by it
        width = x_BD.shape[1]
        state = self.state[weight]
        if not state:
            state["rows"] = torch.zeros(*weight.shape[:2], 2, device=weight.device)  # v and c
            state["features"] = torch.zeros(width, device=weight.device)  # f
            state["step"] = 0
        state["step"] += 1
        noise = None
        if weight.dtype == torch.bfloat16:
            noise = noise_of_step(weight, state["step"])
        # 1. The second moment of the features, and from it a factor for each.
        f_D = state["features"]
        f_D.mul_(self.beta).add_(squares_of_features(dz_BUF, x_BD), alpha=1 - self.beta)
        mean = f_D.mean()
        scale_D = ((mean + 1e-30) / (f_D + FLOOR * mean + 1e-30)).sqrt()
        scaled_BD = x_BD * scale_D
        between_BB = x_BD @ x_BD.T

        dz_parts = dz_BUF.split(chunk_of(weight), 1)
        for part, dz_BnF in zip(in_parts(clusters_U, weight), dz_parts, strict=True):
            dz_BR = dz_BnF.flatten(1)
            # 2. The second moment of the rows. lerp_ moves v towards the square and c towards 1, by
            #    1 - beta of the way; not at all in a row without a gradient.
            square_R = squares_of_rows(dz_BR, between_BB) / width
            here_R = (square_R > 0).to(square_R.dtype)  # 1 in rows with a gradient
            vc_R2 = read(state["rows"], part).view(-1, 2)
            now_R2 = torch.stack([square_R, here_R], 1)
            vc_R2.lerp_(now_R2, (1 - self.beta) * here_R[:, None])
            v_R, c_R = vc_R2.unbind(1)

            # 3. What the gradient is divided by. Where the row could go too far, more than that.
            size_R = (v_R / c_R.clamp(min=1e-12)).sqrt()
            size_R = torch.maximum(size_R, bound_of_rows(dz_BR, scaled_BD) / BOUND) + 1e-12

            # 4. The step is one product: the gradient dz^T x, with what its rows are divided by at
            #    the factor dz, and what its features are divided by at x.
            step_BR = dz_BR * (-lr * here_R / size_R)
            add_product(weight, part, step_BR.T, scaled_BD, noise)
            if clusters_U is not None:
                state["rows"].index_copy_(0, part, vc_R2.view(len(part), -1, 2))

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state, and keep its numbers float32 where the weights are bfloat16."""
        super().load_state_dict(state_dict)  # this turns everything into the weights' type
        # It also fills self.state in the order of the saved one.
        for weight, saved in zip(self.state, state_dict["state"].values(), strict=True):
            self.state[weight] = {
                "rows": saved["rows"].to(weight.device),
                "features": saved["features"].to(weight.device),
                "step": saved.get("step", 0),  # older files have none
            }


def refuse(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """RuntimeError if another optimiser than RowAdam is about to step over a sparse head."""
    if isinstance(optimizer, RowAdam):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if getattr(parameter, "factors", None):
                raise RuntimeError(
                    f"{type(optimizer).__name__} cannot train the weights of a sparse head: they "
                    "have no .grad, and the factors of their gradient would pile up. Give the "
                    'groups of model.param_groups() that are marked "rows" to '
                    "plumbing.label_level.RowAdam, or build the head with sparse=False"
                )


HOOKS = []  # one for the whole process


def refuse_other_optimizers() -> None:
    """From now on torch asks `refuse` before any optimiser's step."""
    if not HOOKS:
        HOOKS.append(register_optimizer_step_pre_hook(refuse))
