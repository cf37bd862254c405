"""The label level, by far the biggest: a step reads and writes the clusters of its shortlists, a chunk at a time, and
their gradient need not be there as a whole. 03_model.py uses ShortlistProduct for the logits, 04_train.py RowAdam.

The U clusters that any document of a batch keeps are together a small dense layer (U, F, D). One product for the batch
gives its logits, those that a document did not ask for included: as soon as shortlists overlap, that is cheaper than to
gather every document's own weights, (B, K, F, D) numbers. Backward, with dz the gradient of the logits, scattered into
(B, U, F), one more product gives that of the features, dz W. That of the weights, dz^T x, is as big as the layer. It
is left as these two factors, Factors, until the optimiser multiplies them chunk by chunk and uses each up at once; only
when the gradients of several batches are added up is their sum made whole.

Not here: several devices; momentum, a second number per weight.
Shapes   B batch, D width, C clusters, F children of each (fan), K kept for a document, U kept for any of a batch
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = {"cpu": 2**17, "cuda": 2**25}  # weights that are worked on at a time: on a CPU, what its caches hold


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


def chunks(parts: list[Factors], n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (clusters (n,), their gradient (n, F, D)); that of several batches added up, for which it is made whole."""
    clusters_U, dz_BUF, x_BD = parts[0]
    if len(parts) == 1:
        for clusters, dz in zip(clusters_U.split(n), dz_BUF.split(n, 1), strict=True):
            yield clusters, (dz.flatten(1).T @ x_BD).view(*dz.shape[1:], -1)
        return
    clusters_U, places = torch.cat([part.clusters_U for part in parts]).unique(return_inverse=True)
    places = places.split([len(part.clusters_U) for part in parts])
    g_UFD = x_BD.new_zeros(len(clusters_U), dz_BUF.shape[2], x_BD.shape[1])
    for place, (_, dz_BUF, x_BD) in zip(places, parts, strict=True):
        g_UFD.index_add_(0, place, (dz_BUF.flatten(1).T @ x_BD).view(*dz_BUF.shape[1:], -1))
    yield from zip(clusters_U.split(n), g_UFD.split(n), strict=True)


class ShortlistProduct(torch.autograd.Function):
    """Logits (B, K, F) of the children of each document's clusters (B, K), from weight (C, F, D) and bias (C, F). Those
    two get no .grad but .factors, a list with an item per backward pass, which only RowAdam.step() empties."""

    @staticmethod
    def forward(ctx, x_BD: Tensor, weight: Tensor, bias: Tensor, clusters_BK: Tensor) -> Tensor:
        clusters_U, place_BK = touched(clusters_BK, len(weight), wait=not (x_BD.is_cuda and ctx.needs_input_grad[0]))
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
        parts = zip(dz_BUF.split(ctx.n, 1), clusters_U.split(ctx.n), strict=True)
        dx = [dz.flatten(1).to(weight.dtype) @ weight.index_select(0, u).flatten(0, 1) for dz, u in parts]
        return sum(part_BD.to(x_BD.dtype) for part_BD in dx), None, None, None


def round_stochastically(values: Tensor) -> Tensor:
    """bfloat16 of float32, up or down at random so that the mean is right: rounding to the nearest would lose every
    change of a weight by less than a five-hundredth of itself."""
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device)
    return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


class RowAdam(torch.optim.Optimizer):
    """Adam for the rows of labels: reads and writes the clusters that the gradient names. Instead of two moments per
    weight it keeps the mean square v of a row's gradient, the weight c of the row's history, and the squares f of the
    features' gradients in all rows (second moments in two factors: Adafactor, Shazeer and Stern 2018):

        v <- beta v + (1 - beta) mean_d(g^2)    c <- beta c + (1 - beta)
        w <- w - lr (g / sqrt(v / c * f / mean_d(f)) + decay w)    f <- beta f + (1 - beta) sum_rows(g^2)

    Rows without any gradient, empty slots for one, stay as they are. The f of the steps before, where Adafactor's is of
    this one, too, allows a single pass over the gradient. bfloat16 is rounded stochastically."""

    def __init__(self, groups: list[dict], beta: float = 0.99) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0})
        self.beta = beta

    @torch.no_grad()
    def step(self, scale: Tensor | float = 1.0) -> None:
        """One step, which uses the gradients up; `scale`: what the loss was multiplied by."""
        for group in self.param_groups:
            for weight in group["params"]:
                if parts := weight.__dict__.pop("factors", []):
                    parts = [part._replace(x_BD=part.x_BD / scale) for part in parts]
                    self.update(weight, parts, group["lr"], group["weight_decay"])

    def update(self, weight: Tensor, parts: list[Factors], lr: float, decay: float) -> None:
        """One step of a weight (C, F, D) or a bias (C, F), whose rows have a single feature."""
        state = self.state[weight]
        if not state:
            shapes = {"rows": (*weight.shape[:2], 2), "features": weight.shape[2:] or 1}
            state.update({name: torch.zeros(n, device=weight.device) for name, n in shapes.items()})
        rows, features_D = state["rows"], state["features"]
        scale_D = ((features_D.mean() + 1e-30) / (features_D + 1e-30)).sqrt()  # of ones in the first step
        features_D.mul_(self.beta)
        for clusters, g in chunks(parts, max(1, CHUNK[weight.device.type] // weight[0].numel())):
            square = g.square()
            features_D.add_(square.sum((0, 1)), alpha=1 - self.beta)
            square = square.mean(2, keepdim=True)
            here = (square > 0).float()
            vc = rows.index_select(0, clusters).lerp_(torch.cat([square, here], 2), (1 - self.beta) * here)
            rows.index_copy_(0, clusters, vc)
            v, c = vc.split(1, 2)
            rate = lr * here / ((v / c.clamp(min=1e-12)).sqrt() + 1e-12)
            w = weight.index_select(0, clusters).float()
            w.view_as(g).mul_(1 - lr * decay * here).addcmul_(g.mul_(scale_D), rate, value=-1)
            weight.index_copy_(0, clusters, round_stochastically(w) if weight.dtype == torch.bfloat16 else w)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)  # which turns everything to the type of the weights
        for weight, saved in zip(self.state, state_dict["state"].values(), strict=True):
            self.state[weight] = {key: value.to(weight.device) for key, value in saved.items()}
