"""Linear SVMs with squared hinge for several labels at once, in sparse and dense products alone.

A linear SVM (support vector machine) is a classifier that asks for more than the right side: the
margin w.x shall be at least 1 for what is right, and at most -1 for what is wrong. What a margin
lacks is its slack. Each column w of W minimises, over rows x = [words ; dense features] and targets
y of +1 or -1,

    |w|^2 / 2 + c sum_i mask_i max(0, 1 - y_i w.x_i)^2

Rows with a slack, where y w.x < 1, pull at w; the others do not. So the function is convex and made
of quadratic pieces, and Newton's method needs a handful of rounds:

    gradient   w - 2 c sum_i slack_i y_i x_i           over the rows with a slack
    curvature  1 + 2 c sum_i x_i x_i^T                 over the same rows
    step       curvature^-1 (-gradient)

The matrix of the curvature is never made. Conjugate gradients find the step from its products with
vectors (a truncated Newton method, as in Keerthi and DeCoste, JMLR 2005). All columns share the
products: labels of a leaf cluster are on nearly the same documents.

Shapes   n documents, F labels, V words, D dense features
"""

import numpy as np
from scipy.sparse import csr_matrix


def dots(a_xF: np.ndarray, b_xF: np.ndarray) -> np.ndarray:
    """(F,) products of the columns of a with those of b."""
    return np.einsum("xf,xf->f", a_xF, b_xF)


class Documents:
    """The rows x of n documents, and the two products with them that everything is made of."""

    def __init__(self, X_nV: csr_matrix, E_nD: np.ndarray) -> None:
        self.X_nV = X_nV
        self.E_nD = E_nD
        self.n_words = X_nV.shape[1]
        # Transposed once: both are needed in every round, and in the order that products like.
        self.XT_Vn = csr_matrix(X_nV.T)
        self.ET_Dn = np.ascontiguousarray(E_nD.T)

    def margins(self, W: np.ndarray) -> np.ndarray:
        """(n, F): w.x of every document and label."""
        return self.X_nV @ W[: self.n_words] + self.E_nD @ W[self.n_words :]

    def sums(self, r_nF: np.ndarray) -> np.ndarray:
        """(V + D, F): the sum of the documents' x, each times its number."""
        return np.concatenate([self.XT_Vn @ r_nF, self.ET_Dn @ r_nF])


def fit(
    X_nV: csr_matrix,
    E_nD: np.ndarray,
    positive_nF: np.ndarray,
    mask_nF: np.ndarray,
    c: float,
    rounds: int = 20,
    inner: int = 20,
    tolerance: float = 0.1,
) -> np.ndarray:
    """(V + D, F): a squared-hinge SVM per column, on the documents of its mask.

    A column is done when its gradient has come down to `tolerance` times the share of its rarer
    class, from what it was at w = 0.
    """
    documents = Documents(X_nV, E_nD)
    y_nF = np.where(positive_nF, 1, -1).astype(np.float32)
    # The weight of a slack in the gradient: 2 c, and 0 outside of the mask.
    c_nF = 2 * c * mask_nF.astype(np.float32)
    W = np.zeros((documents.n_words + E_nD.shape[1], y_nF.shape[1]), np.float32)
    z_nF = np.zeros_like(y_nF)  # the margins of W
    goal_F = tolerance_of_gradient(documents, y_nF, c_nF, positive_nF, mask_nF, tolerance)
    for _ in range(rounds):
        # 1. Minus the gradient, and which columns are not done.
        slack_nF = np.maximum(0, 1 - y_nF * z_nF)
        downhill = documents.sums(c_nF * slack_nF * y_nF) - W
        todo_F = dots(downhill, downhill) > goal_F**2
        if not todo_F.any():
            break
        # 2. The step. Only rows that have a slack now are curved.
        curve_nF = c_nF * (slack_nF > 0)
        step = newton_step(documents, curve_nF, downhill, todo_F, inner)
        # 3. The whole step, or half of it, or a quarter, ..., until the loss is less.
        dz_nF = documents.margins(step)
        t_F = step_length(W, step, z_nF, dz_nF, y_nF, c_nF, todo_F)
        W += t_F * step
        # Margins are linear in W, so they need not be computed anew.
        z_nF += t_F * dz_nF
    return W


def tolerance_of_gradient(
    documents: Documents,
    y_nF: np.ndarray,
    c_nF: np.ndarray,
    positive_nF: np.ndarray,
    mask_nF: np.ndarray,
    tolerance: float,
) -> np.ndarray:
    """(F,): the length of the gradient at which a column is done."""
    # A label with few positive documents starts with a gradient that is mostly of negatives. The
    # rarer its positives are, the more exact its column must be.
    n_positive_F = (positive_nF & mask_nF).sum(axis=0)
    share_F = n_positive_F / np.maximum(mask_nF.sum(axis=0), 1)
    rarer_F = np.minimum(share_F, 1 - share_F).clip(1e-3)
    # At w = 0 every slack is 1.
    first_gradient = documents.sums(c_nF * y_nF)
    return np.linalg.norm(first_gradient, axis=0) * tolerance * rarer_F


def newton_step(
    documents: Documents,
    curve_nF: np.ndarray,
    downhill: np.ndarray,
    todo_F: np.ndarray,
    inner: int,
) -> np.ndarray:
    """(V + D, F): about curvature^-1 `downhill`, by at most `inner` conjugate gradients.

    Conjugate gradients solve an equation A s = d with products A v alone. The residual d - A s says
    what the solution lacks. Each round goes along a direction as far as the residual can be made
    smaller, and chooses the next direction so that it does not undo this. Columns that are done
    (not in `todo_F`) get a step of 0.
    """
    step = np.zeros_like(downhill)
    residual = downhill.copy()
    direction = downhill.copy()
    size_F = dots(residual, residual)
    # A tenth of the length, a hundredth of its square: the next round of Newton's method starts
    # from another curvature, so more would be wasted.
    enough_F = 0.01 * size_F
    for _ in range(inner):
        # 1. The curvature times the direction: (1 + 2 c sum x x^T) direction.
        curved = direction + documents.sums(curve_nF * documents.margins(direction))
        # 2. How far to go, in columns that are not there yet.
        along_F = size_F / np.maximum(dots(direction, curved), 1e-30)
        goes_on_F = (size_F > enough_F) & todo_F
        alpha_F = np.where(goes_on_F, along_F, 0)
        step += alpha_F * direction
        residual -= alpha_F * curved
        # 3. Is every column there?
        before_F = size_F
        size_F = dots(residual, residual)
        if (size_F <= enough_F)[todo_F].all():
            break
        # 4. The next direction: the residual, and as much of the last direction as keeps what was
        #    gained.
        direction = residual + size_F / np.maximum(before_F, 1e-30) * direction
    return step


def step_length(
    W: np.ndarray,
    step: np.ndarray,
    z_nF: np.ndarray,
    dz_nF: np.ndarray,
    y_nF: np.ndarray,
    c_nF: np.ndarray,
    todo_F: np.ndarray,
) -> np.ndarray:
    """(F,): 1, 1/2, 1/4, ..., the first share of the step that does not raise a column's loss.

    The quadratic piece that the step was made for ends where a row loses or gets its slack. A whole
    step may go too far beyond. When ten shares were too long, the next one is taken untested.
    """
    slack_nF = np.maximum(0, 1 - y_nF * z_nF)
    # Twice the loss: |w|^2, and the squares of the slacks.
    norm_F = dots(W, W)
    loss_F = norm_F + dots(c_nF, slack_nF**2)
    # |w + t step|^2 is a quadratic function of t.
    linear_F = dots(W, step)
    quadratic_F = dots(step, step)
    t_F = todo_F.astype(np.float32)  # columns that are done stay where they are
    for _ in range(10):
        new_slack_nF = np.maximum(0, 1 - y_nF * (z_nF + t_F * dz_nF))
        new_norm_F = norm_F + 2 * t_F * linear_F + t_F**2 * quadratic_F
        new_F = new_norm_F + dots(c_nF, new_slack_nF**2)
        worse_F = new_F > loss_F
        if not worse_F.any():
            break
        t_F = np.where(worse_F, t_F / 2, t_F)
    return t_F
