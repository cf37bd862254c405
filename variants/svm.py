"""Linear SVMs with squared hinge for several labels at once, in sparse and dense products alone.

Each column f of W minimises |w|^2 / 2 + c sum_i mask_if max(0, 1 - y_if w.x_i)^2 over rows x = [words ; dense]. This is
convex and piecewise quadratic, so Newton's method needs a handful of rounds, and conjugate gradients find each step
without ever making the matrix of second derivatives (a truncated Newton method, as in Keerthi and DeCoste, JMLR 2005).
The products are shared by all columns: labels of a leaf cluster are on nearly the same documents.

Shapes   n documents, F labels, V words, D dense features
"""

import numpy as np
from scipy.sparse import csr_matrix


def fit(X_nV: csr_matrix, E_nD: np.ndarray, positive_nF: np.ndarray, mask_nF: np.ndarray, c: float,
        rounds: int = 20, inner: int = 20, tolerance: float = 0.1) -> np.ndarray:
    """(V + D, F): a squared-hinge SVM per column on the documents of its mask, by Newton's method with conjugate
    gradients. A column is done when its gradient has come down to `tolerance` times the share of its rarer class."""
    V, XT_Vn, ET_Dn = X_nV.shape[1], csr_matrix(X_nV.T), np.ascontiguousarray(E_nD.T)
    y_nF, c_nF = np.where(positive_nF, 1, -1).astype(np.float32), 2 * c * mask_nF.astype(np.float32)

    def margins(W: np.ndarray) -> np.ndarray:
        return X_nV @ W[:V] + E_nD @ W[V:]

    def sums(r_nF: np.ndarray) -> np.ndarray:
        return np.concatenate([XT_Vn @ r_nF, ET_Dn @ r_nF])

    def dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.einsum("xf,xf->f", a, b)

    W, z_nF = np.zeros((V + E_nD.shape[1], y_nF.shape[1]), np.float32), np.zeros_like(y_nF)
    share_F = (positive_nF & mask_nF).sum(axis=0) / np.maximum(mask_nF.sum(axis=0), 1)
    goal_F = np.linalg.norm(sums(c_nF * y_nF), axis=0) * tolerance * np.minimum(share_F, 1 - share_F).clip(1e-3)
    for _ in range(rounds):
        slack_nF = np.maximum(0, 1 - y_nF * z_nF)
        r = sums(c_nF * slack_nF * y_nF) - W  # minus the gradient
        size_F = dots(r, r)
        todo_F = size_F > goal_F**2
        if not todo_F.any():
            break
        # Conjugate gradients for the step: (1 + the sum of c x x^T over what has slack) step = r.
        curve_nF, step, p, enough_F = c_nF * (slack_nF > 0), np.zeros_like(W), r.copy(), 0.01 * size_F
        for _ in range(inner):
            Hp = p + sums(curve_nF * margins(p))
            alpha_F = np.where((size_F > enough_F) & todo_F, size_F / np.maximum(dots(p, Hp), 1e-30), 0)
            step += alpha_F * p
            r -= alpha_F * Hp
            before_F, size_F = size_F, dots(r, r)
            if (size_F <= enough_F)[todo_F].all():
                break
            p = r + size_F / np.maximum(before_F, 1e-30) * p
        # The whole step, or half of it, or a quarter, ..., until the loss is less.
        dz_nF, t_F, loss_F = margins(step), todo_F.astype(np.float32), dots(W, W) + dots(c_nF, slack_nF**2)
        for _ in range(10):
            new_F = (dots(W, W) + 2 * t_F * dots(W, step) + t_F**2 * dots(step, step)
                     + dots(c_nF, np.maximum(0, 1 - y_nF * (z_nF + t_F * dz_nF)) ** 2))
            if not (worse_F := new_F > loss_F).any():
                break
            t_F = np.where(worse_F, t_F / 2, t_F)
        W += t_F * step
        z_nF += t_F * dz_nF
    return W
