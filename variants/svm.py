"""Linear SVMs with squared hinge for several labels at once, in sparse and dense products alone.

Each column w of W minimises, over rows x = [words ; dense features] and targets y of +1 or -1,

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
    n_words = X_nV.shape[1]
    XT_Vn = csr_matrix(X_nV.T)
    ET_Dn = np.ascontiguousarray(E_nD.T)
    y_nF = np.where(positive_nF, 1, -1).astype(np.float32)
    c_nF = 2 * c * mask_nF.astype(np.float32)

    def margins(W: np.ndarray) -> np.ndarray:
        """(n, F): w.x of every document and label."""
        return X_nV @ W[:n_words] + E_nD @ W[n_words:]

    def sums(r_nF: np.ndarray) -> np.ndarray:
        """(V + D, F): the sum of the documents' x, each times its number."""
        return np.concatenate([XT_Vn @ r_nF, ET_Dn @ r_nF])

    W = np.zeros((n_words + E_nD.shape[1], y_nF.shape[1]), np.float32)
    z_nF = np.zeros_like(y_nF)  # the margins of W
    n_positive_F = (positive_nF & mask_nF).sum(axis=0)
    share_F = n_positive_F / np.maximum(mask_nF.sum(axis=0), 1)
    rarer_F = np.minimum(share_F, 1 - share_F).clip(1e-3)
    goal_F = np.linalg.norm(sums(c_nF * y_nF), axis=0) * tolerance * rarer_F
    for _ in range(rounds):
        # 1. Minus the gradient, and which columns are not done.
        slack_nF = np.maximum(0, 1 - y_nF * z_nF)
        residual = sums(c_nF * slack_nF * y_nF) - W
        size_F = dots(residual, residual)
        todo_F = size_F > goal_F**2
        if not todo_F.any():
            break
        # 2. The step, by conjugate gradients, and the curvature on the rows that have a slack now.
        curve_nF = c_nF * (slack_nF > 0)
        step = np.zeros_like(W)
        direction = residual.copy()
        enough_F = 0.01 * size_F
        for _ in range(inner):
            curved = direction + sums(curve_nF * margins(direction))
            along_F = size_F / np.maximum(dots(direction, curved), 1e-30)
            alpha_F = np.where((size_F > enough_F) & todo_F, along_F, 0)
            step += alpha_F * direction
            residual -= alpha_F * curved
            before_F = size_F
            size_F = dots(residual, residual)
            if (size_F <= enough_F)[todo_F].all():
                break
            direction = residual + size_F / np.maximum(before_F, 1e-30) * direction
        # 3. The whole step, or half of it, or a quarter, ..., until the loss is less.
        dz_nF = margins(step)
        t_F = todo_F.astype(np.float32)
        loss_F = dots(W, W) + dots(c_nF, slack_nF**2)
        for _ in range(10):
            new_slack_nF = np.maximum(0, 1 - y_nF * (z_nF + t_F * dz_nF))
            norm_F = dots(W, W) + 2 * t_F * dots(W, step) + t_F**2 * dots(step, step)
            new_F = norm_F + dots(c_nF, new_slack_nF**2)
            worse_F = new_F > loss_F
            if not worse_F.any():
                break
            t_F = np.where(worse_F, t_F / 2, t_F)
        W += t_F * step
        z_nF += t_F * dz_nF
    return W
