"""The label level, by far the biggest: a step reads and writes the clusters of its shortlists, and nothing the size of
their gradient is ever made. 03_model.py computes its logits with ShortlistProduct, 04_train.py trains it with RowAdam.

The U clusters that any document of a batch keeps are, copied side by side, a small dense layer (U, F, D): one product
for the batch gives all logits, those that a document did not ask for included, which costs less than to gather every
document's own weights, (B, K, F, D) numbers. Backward, with dz the gradient of the logits, scattered into (B, U, F),
one more product gives that of the features, dz W. That of the weights would be dz^T x, as big as the layer. It is left
as these two factors: the optimiser can get its moments from them (RowAdam) and add their product to the weights.

Not here: a rule for several devices, momentum (a second number per weight).
Shapes   B batch, D width, C clusters, F children of each (fan), K kept for a document, U kept for any of a batch,
         R = clusters * F rows
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = {"cpu": 2**17, "cuda": 2**25}  # weights that are worked on at a time: on a CPU, what its caches hold


def product(x_BD: Tensor, weight_CFD: Tensor, bias_CF: Tensor) -> Tensor:
    """Logits (B, C, F): one product for the whole batch, in the precision of the weights."""
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
    """The gradient of a sparse head's parameter: of cluster u it is sum_b dz_BUF[b, u] x_BD[b], and never formed."""

    clusters_U: Tensor  # int64
    dz_BUF: Tensor  # float32, gradient of the logits
    x_BD: Tensor  # float32, the head's input; ones (B, 1) for a bias


def together(parts: list[Factors]) -> Factors:
    """The gradient of several batches: of all their documents, for the clusters of any."""
    if len(parts) == 1:
        return parts[0]
    clusters_U, place = torch.cat([part.clusters_U for part in parts]).unique(return_inverse=True)
    places = place.split([len(part.clusters_U) for part in parts])
    dz = [dz_BUF.new_zeros(len(dz_BUF), len(clusters_U), dz_BUF.shape[2]).index_copy_(1, u, dz_BUF)
          for (_, dz_BUF, _), u in zip(parts, places, strict=True)]
    return Factors(clusters_U, torch.cat(dz), torch.cat([part.x_BD for part in parts]))


class ShortlistProduct(torch.autograd.Function):
    """Logits (B, K, F) of the children of each document's clusters (B, K), from weight (C, F, D) and bias (C, F). Those
    two get no .grad but .factors, a list with an item per backward pass, which RowAdam uses up."""

    @staticmethod
    def forward(ctx, x_BD: Tensor, weight: Tensor, bias: Tensor, clusters_BK: Tensor) -> Tensor:
        clusters_U, place_BK = touched(clusters_BK, len(weight), wait=not (x_BD.is_cuda and ctx.needs_input_grad[0]))
        index_BKF = place_BK[..., None].expand(-1, -1, weight.shape[1])
        ctx.save_for_backward(x_BD, weight, bias, clusters_U, index_BKF)
        ctx.n = max(1, CHUNK[x_BD.device.type] // weight[0].numel())
        parts = [product(x_BD, weight.index_select(0, u), bias.index_select(0, u)) for u in clusters_U.split(ctx.n)]
        return torch.cat(parts, dim=1).gather(1, index_BKF)

    @staticmethod
    def backward(ctx, dz_BKF: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, weight, bias, clusters_U, index_BKF = ctx.saved_tensors
        dz_BUF = dz_BKF.new_zeros(len(x_BD), len(clusters_U), weight.shape[1]).scatter_add_(1, index_BKF, dz_BKF)
        for parameter, input_BD in ((weight, x_BD.detach()), (bias, torch.ones_like(x_BD[:, :1]))):
            parameter.factors = [*getattr(parameter, "factors", []), Factors(clusters_U, dz_BUF, input_BD)]
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

        v <- beta v + (1 - beta) mean_d(g^2)    c <- beta c + (1 - beta)    f <- beta f + (1 - beta) sum_rows(g^2)
        w <- w - lr (g / sqrt(v / c * f / mean_d(f)) + decay w)

    The gradient g = dz^T x comes as Factors: mean_d(g^2) is the diagonal of dz^T (x x^T / D) dz, sum_rows(g^2) that of
    x^T (dz dz^T) x. Rows without any, empty slots for one, stay as they are. bfloat16 is rounded stochastically."""

    def __init__(self, groups: list[dict], beta: float = 0.99) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0})
        self.beta = beta

    @torch.no_grad()
    def step(self, closure: None = None, scale: Tensor | float = 1.0) -> None:
        """One step, which uses the gradients up; `scale`: what the loss was multiplied by."""
        for group in self.param_groups:
            for weight in group["params"]:
                if parts := weight.__dict__.pop("factors", []):
                    clusters_U, dz_BUF, x_BD = together(parts)
                    self.update(weight, clusters_U, dz_BUF, x_BD / scale, group["lr"], group["weight_decay"])

    def update(self, weight: Tensor, clusters_U: Tensor, dz_BUF: Tensor, x_BD: Tensor, lr: float, decay: float) -> None:
        """One step for some clusters: the moments of all, then the weights."""
        state = self.state[weight]
        if not state:
            shapes = {"rows": (*weight.shape[:2], 2), "features": x_BD.shape[1]}
            state.update({name: torch.zeros(n, device=weight.device) for name, n in shapes.items()})
        rows, features_D = state["rows"], state["features"]
        n = max(1, CHUNK[weight.device.type] // (weight.shape[1] * max(x_BD.shape)))
        x_BB, dz_BB, squares = x_BD @ x_BD.T / x_BD.shape[1], 0.0, []
        for dz_BR in (dz.flatten(1) for dz in dz_BUF.split(n, 1)):  # R = clusters * F
            squares.append((dz_BR * (x_BB @ dz_BR)).sum(0))
            dz_BB = dz_BB + dz_BR @ dz_BR.T
        features_D.lerp_((x_BD * (dz_BB @ x_BD)).sum(0).clamp(min=0), 1 - self.beta)  # rounding may go below 0
        scaled_BD = x_BD * ((features_D.mean() + 1e-30) / (features_D + 1e-30)).sqrt()
        square_UF1 = torch.cat(squares).clamp(min=0).view(*dz_BUF.shape[1:], 1)
        here_UF1 = (square_UF1 > 0).float()
        now_UF2 = torch.cat([square_UF1, here_UF1], dim=2)
        rows_UF2 = rows.index_select(0, clusters_U).lerp_(now_UF2, (1 - self.beta) * here_UF1)
        rows.index_copy_(0, clusters_U, rows_UF2)
        square_UF1, history_UF1 = rows_UF2.split(1, dim=2)
        rate_UF1 = lr * here_UF1 / ((square_UF1 / history_UF1.clamp(min=1e-12)).sqrt() + 1e-12)
        parts = (clusters_U.split(n), dz_BUF.split(n, 1), (1 - lr * decay * here_UF1).split(n), rate_UF1.split(n))
        for clusters, dz, keep, rates in zip(*parts, strict=True):
            w = weight.index_select(0, clusters).float()
            dz_RB = (dz * rates.squeeze(2)).flatten(1).T
            w.view(-1, x_BD.shape[1]).mul_(keep.view(-1, 1)).addmm_(dz_RB, scaled_BD, alpha=-1)
            weight.index_copy_(0, clusters, round_stochastically(w) if weight.dtype == torch.bfloat16 else w)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)  # which turns everything to the type of the weights
        for weight, saved in zip(self.state, state_dict["state"].values(), strict=True):
            self.state[weight] = {key: value.to(weight.device) for key, value in saved.items()}
