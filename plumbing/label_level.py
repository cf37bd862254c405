"""The label level, by far the biggest: a step reads and writes the clusters of its shortlists, a chunk at a time, and
their gradient need not be there as a whole. 03_model.py uses ShortlistProduct for the logits, 04_train.py RowAdam.

The U clusters that any document of a batch keeps are together a small dense layer (U, F, D). One product for the batch
gives its logits, those that a document did not ask for included: as soon as shortlists overlap, that is cheaper than to
gather every document's own weights, (B, K, F, D) numbers. Backward, with dz the gradient of the logits, scattered into
(B, U, F), one more product gives the gradient of the features, dz W. The gradient of the weights is dz^T x. It is as
big as the layer itself, so it is not built. It is left as its two factors, Factors, until the optimiser multiplies them
chunk by chunk and uses each chunk up at once; only when the gradients of several batches are added up is their sum made
whole.

Not here: several devices; momentum, a second number per weight.
Shapes   B batch, D width, C clusters, F children of each (fan), K kept for a document, U kept for any of a batch
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = {"cpu": 2**17, "cuda": 2**25}  # weights that are worked on at a time: on a CPU, what its caches hold
BOUND = 10.0  # learning rates that a weight moves in a step at most
SUMMED = 1024  # clusters whose squares are formed at a time
FLOOR = 1e-3  # of the mean: what is added to the squares of every feature


def product(x_BD: Tensor, weight_CFD: Tensor, bias_CF: Tensor) -> Tensor:
    """Logits (B, C, F) of some clusters or of all: one product for the batch, in the precision of the weights."""
    logits = x_BD.to(weight_CFD.dtype) @ weight_CFD.flatten(0, 1).T
    return logits.view(len(x_BD), *bias_CF.shape) + bias_CF


def touched(clusters_BK: Tensor, n_clusters: int, wait: bool) -> tuple[Tensor, Tensor]:
    """(clusters (U,) that occur, place (B, K) of each among them). To count them, a GPU would have to be waited for:
    without `wait`, in training, U is the most there can be, min(B * K, n_clusters), filled up with others."""
    if wait:
        return clusters_BK.unique(return_inverse=True)
    occurs_C = torch.zeros(n_clusters, dtype=torch.uint8, device=clusters_BK.device)
    filled_C = occurs_C.scatter_(0, clusters_BK.flatten(), 1).argsort(descending=True, stable=True)
    place_C = torch.empty_like(filled_C).scatter_(0, filled_C, torch.arange(n_clusters, device=filled_C.device))
    return filled_C[: min(clusters_BK.numel(), n_clusters)], place_C[clusters_BK]


class Factors(NamedTuple):
    """A gradient (C, F, D) by its factors: of cluster u it is the sum over documents of dz_BUF[b, u] x_BD[b]."""

    clusters_U: Tensor  # int64
    dz_BUF: Tensor  # float32, gradient of the logits
    x_BD: Tensor  # float32, input of the head


class Gradient:
    """The gradient of a weight (C, F, D), for one step of RowAdam.

    From one batch it stays two factors, which `chunks` multiplies for a few clusters at a time.
    From several batches (--accumulate) their sum is made whole.
    """

    def __init__(self, parts: list[Factors], scale: Tensor | float) -> None:
        self.x_BD = [part.x_BD / scale for part in parts]
        self.dz_BUF = [part.dz_BUF for part in parts]
        self.sum_UFD = None
        if len(parts) == 1:
            self.clusters_U = parts[0].clusters_U
            self.place_U = [slice(None)]
            return
        # Each batch has touched clusters of its own. The sum is over all of them.
        every = torch.cat([part.clusters_U for part in parts])
        self.clusters_U, places = every.unique(return_inverse=True)
        self.place_U = places.split([len(part.clusters_U) for part in parts])
        fan = parts[0].dz_BUF.shape[2]
        width = parts[0].x_BD.shape[1]
        self.sum_UFD = self.x_BD[0].new_zeros(len(self.clusters_U), fan, width)
        for place, dz_BUF, x_BD in zip(self.place_U, self.dz_BUF, self.x_BD, strict=True):
            self.sum_UFD.index_add_(0, place, times(dz_BUF, x_BD))

    def squares_of_features(self) -> Tensor:
        """(D,) squares of the gradient, summed over all rows.

        From the factors, sum_r (sum_b dz_br x_bd)^2 = sum_bc x_bd (sum_r dz_br dz_cr) x_cd: a product of documents
        with documents comes first, so that the gradient itself is not needed.
        """
        if self.sum_UFD is not None:
            return torch.stack([part.square().sum((0, 1)) for part in self.sum_UFD.split(SUMMED)]).sum(0)
        dz_BR = self.dz_BUF[0].flatten(1)
        x_BD = self.x_BD[0]
        between_BB = dz_BR @ dz_BR.T
        return (x_BD * (between_BB @ x_BD)).sum(0).clamp(min=0)  # rounding may go below nothing

    def bound_of_rows(self, scale_D: Tensor) -> Tensor:
        """(U, F): no entry of a row of the scaled gradient is larger than this, the smaller of two bounds.

        |sum_b dz_b x_bd| <= sum_b |dz_b| max_d |x_bd|             sharp where few documents pull at a row
        |sum_b dz_b x_bd| <= |dz| max_d |x_d|, both of length B    sharp where many do (Cauchy and Schwarz)
        """
        bounds = []
        for dz_BUF, x_BD in zip(self.dz_BUF, self.x_BD, strict=True):
            x_BD = x_BD * scale_D
            by_few = torch.einsum("buf,b->uf", dz_BUF.abs(), x_BD.abs().amax(1))
            by_many = torch.linalg.vector_norm(dz_BUF, dim=0) * torch.linalg.vector_norm(x_BD, dim=0).max()
            bounds.append(torch.minimum(by_few, by_many))
        if self.sum_UFD is None:
            return bounds[0]
        # Of several batches: what each could add.
        bound_UF = bounds[0].new_zeros(self.sum_UFD.shape[:2])
        for place, part_UF in zip(self.place_U, bounds, strict=True):
            bound_UF.index_add_(0, place, part_UF)
        return bound_UF

    def chunks(self, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (clusters (n,), their gradient (n, F, D)), n clusters at a time."""
        if self.sum_UFD is not None:
            yield from zip(self.clusters_U.split(n), self.sum_UFD.split(n), strict=True)
            return
        for clusters, dz_BnF in zip(self.clusters_U.split(n), self.dz_BUF[0].split(n, 1), strict=True):
            yield clusters, times(dz_BnF, self.x_BD[0])


def times(dz_BUF: Tensor, x_BD: Tensor) -> Tensor:
    """The gradient (U, F, D) that two factors stand for."""
    return (dz_BUF.flatten(1).T @ x_BD).view(*dz_BUF.shape[1:], -1)


class ShortlistProduct(torch.autograd.Function):
    """Logits (B, K, F) of the children of each document's clusters (B, K), from weight (C, F, D) and bias (C, F). Those
    two get no .grad but .factors, a list with an item per backward pass, which only RowAdam.step() empties."""

    @staticmethod
    def forward(ctx, x_BD: Tensor, weight: Tensor, bias: Tensor, clusters_BK: Tensor, learns: bool = True) -> Tensor:
        clusters_U, place_BK = touched(clusters_BK, len(weight), wait=not (x_BD.is_cuda and learns))
        index_BKF = place_BK[..., None].expand(-1, -1, weight.shape[1])
        ctx.save_for_backward(x_BD, clusters_U, index_BKF)
        ctx.parameters = weight, bias  # themselves, not what autograd saves of them
        ctx.n = max(1, CHUNK[x_BD.device.type] // weight[0].numel())
        parts = [product(x_BD, weight.index_select(0, u), bias.index_select(0, u)) for u in clusters_U.split(ctx.n)]
        return torch.cat(parts, dim=1).gather(1, index_BKF)

    @staticmethod
    def backward(ctx, dz_BKF: Tensor) -> tuple[Tensor | None, ...]:
        (x_BD, clusters_U, index_BKF), (weight, bias) = ctx.saved_tensors, ctx.parameters
        dz_BUF = dz_BKF.new_zeros(len(x_BD), len(clusters_U), weight.shape[1]).scatter_add_(1, index_BKF, dz_BKF)
        if ctx.needs_input_grad[1]:
            of_bias = dz_BUF.sum(0, keepdim=True), x_BD.new_ones(1, 1)
            for parameter, factors in ((weight, (dz_BUF, x_BD.detach())), (bias, of_bias)):
                parameter.factors = [*getattr(parameter, "factors", []), Factors(clusters_U, *factors)]
        if not ctx.needs_input_grad[0]:  # features from a cache: nobody asks for their gradient
            return None, None, None, None, None
        parts = zip(dz_BUF.split(ctx.n, 1), clusters_U.split(ctx.n), strict=True)
        dx = [dz.flatten(1).to(weight.dtype) @ weight.index_select(0, u).flatten(0, 1) for dz, u in parts]
        return sum(part_BD.to(x_BD.dtype) for part_BD in dx), None, None, None, None


def round_stochastically(values: Tensor) -> Tensor:
    """bfloat16 of float32, up or down at random so that the mean is right: rounding to the nearest would lose every
    change of a weight by less than a five-hundredth of itself."""
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device)
    return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


class RowAdam(torch.optim.Optimizer):
    """Adam for the rows of labels. It reads and writes the clusters that the gradient names, and no others.

    Instead of two moments per weight it keeps the second moment in two factors (Adafactor, Shazeer and Stern 2018):
    one number per feature, f, and one per row, v. A step is

        f <- beta f + (1 - beta) sum_rows(g^2)        how large the gradient of each feature is, in all rows
        v <- beta v + (1 - beta) mean_features(g^2)   how large the gradient of each row is; bias-corrected, see below
        w <- w - lr (g / sqrt(v f / mean(f)) + decay w)

    f and v are updated first, and divide afterwards: the divisor already contains the gradient of this very step. A
    gradient that is suddenly large makes its own divisor large, so a feature that was always zero, or a row that never
    had a gradient, may become active without a huge step. Two factors are not the whole second moment, though: a row
    whose gradient stands in features that are small everywhere else would still go far. So the step of every row is
    capped: no weight moves further than BOUND learning rates, by construction. The cap is computed from the factors,
    which costs little. It looks at what documents could add up to, and they cancel in part, so it also slows down one
    or two rows in a hundred that needed no cap.

    A feature may be dead: zero in every document. FLOOR keeps its scale finite and does not blow up rounding noise.

    v starts at 0 and is too small in a row's first steps. c is updated as v is, with 1 in place of the square, so that
    v / c is a true mean over the steps in which the row had a gradient. Rows without any gradient, such as empty slots,
    stay as they are. bfloat16 is rounded stochastically.
    """

    def __init__(self, groups: list[dict], beta: float = 0.99) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0})
        self.beta = beta

    @torch.no_grad()
    def step(self, scale: Tensor | float = 1.0) -> None:
        """One step, which uses the gradients up; `scale`: what the loss was multiplied by."""
        for group in self.param_groups:
            for weight in group["params"]:
                parts = weight.__dict__.pop("factors", [])
                if parts:
                    self.update(weight, Gradient(parts, scale), group["lr"], group["weight_decay"])

    def update(self, weight: Tensor, gradient: Gradient, lr: float, decay: float) -> None:
        """One step of a weight (C, F, D) or a bias (C, F), whose rows have a single feature."""
        state = self.state[weight]
        if not state:
            state["rows"] = torch.zeros(*weight.shape[:2], 2, device=weight.device)
            state["features"] = torch.zeros(weight.shape[2:] or 1, device=weight.device)
        features_D = state["features"]
        features_D.mul_(self.beta).add_(gradient.squares_of_features(), alpha=1 - self.beta)
        mean = features_D.mean()
        scale_D = ((mean + 1e-30) / (features_D + FLOOR * mean + 1e-30)).sqrt()

        bound_UF = gradient.bound_of_rows(scale_D)
        n = max(1, CHUNK[weight.device.type] // weight[0].numel())
        for (clusters, g), bound in zip(gradient.chunks(n), bound_UF.split(n), strict=True):
            # The row's mean square, of this step too. A row without a gradient keeps its history.
            square = torch.linalg.vector_norm(g, dim=2, keepdim=True).square() / g.shape[2]
            here = (square > 0).float()
            vc = state["rows"].index_select(0, clusters)
            vc.lerp_(torch.cat([square, here], 2), (1 - self.beta) * here)
            state["rows"].index_copy_(0, clusters, vc)
            v, c = vc.split(1, 2)
            size = (v / c.clamp(min=1e-12)).sqrt()
            size = torch.maximum(size, bound[..., None] / BOUND) + 1e-12

            w = weight.index_select(0, clusters).float()
            w.view_as(g).mul_(1 - lr * decay * here).addcmul_(g.mul_(scale_D), lr * here / size, value=-1)
            if weight.dtype == torch.bfloat16:
                w = round_stochastically(w)
            weight.index_copy_(0, clusters, w)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)  # which turns everything to the type of the weights
        for weight, saved in zip(self.state, state_dict["state"].values(), strict=True):
            self.state[weight] = {key: value.to(weight.device) for key, value in saved.items()}
