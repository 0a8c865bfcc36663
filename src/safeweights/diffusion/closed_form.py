"""Editing a linear map in closed form (Gandikota et al., WACV 2024, arXiv:2308.14761); also the core of RECE and MACE."""

from __future__ import annotations

import torch
from torch import Tensor


def edit(
    W_o: Tensor,
    keys_edit: Tensor,
    values_edit: Tensor,
    keys_retain: Tensor | None = None,
    *,
    values_retain: Tensor | None = None,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
    lam: float = 0.5,
) -> Tensor:
    """The map that sends edited keys to new values, keeps retained keys and stays near the old one.

    W = (sum_i alpha v_i c_i^T + sum_j beta u_j c_j^T + lam W_o) (sum_i alpha c_i c_i^T + sum_j beta c_j c_j^T + lam I)^-1,
    u_j = W_o c_j without ``values_retain``: the minimum of
    sum_i alpha |W c_i - v_i|^2 + sum_j beta |W c_j - u_j|^2 + lam |W - W_o|^2.

    ``W_o`` (out, in), keys (n, in), values (n, out), ``alpha`` and ``beta`` numbers or one weight per row. Solved in float64 as a
    change of W_o, so that nothing to change leaves it exactly as it was; returned in W_o's dtype. ``lam`` 0 gives the smallest
    change among equal minima. Raises ValueError for a negative weight or non-finite keys and values.
    """
    old = W_o.detach().double()
    keys = [keys_edit.to(old)]
    errors = [values_edit.to(old) - keys[0] @ old.T]
    weights = [torch.as_tensor(alpha, dtype=old.dtype, device=old.device).expand(len(keys[0]))]
    if keys_retain is not None and len(keys_retain):
        keys.append(keys_retain.to(old))
        kept = keys[1] @ old.T
        errors.append(torch.zeros_like(kept) if values_retain is None else values_retain.to(old) - kept)
        weights.append(torch.as_tensor(beta, dtype=old.dtype, device=old.device).expand(len(keys[1])))
    C, E, w = torch.cat(keys), torch.cat(errors), torch.cat(weights)
    if lam < 0 or bool((w < 0).any()):
        raise ValueError("alpha, beta and lam must not be negative")
    if not (torch.isfinite(C).all() and torch.isfinite(E).all()):
        raise ValueError("keys or values hold NaN or infinite entries")
    # Least squares on stacked rows avoids squaring the condition number of C^T C.
    root = w.sqrt()[:, None]
    rows, targets = root * C, root * E
    if lam > 0:
        ridge = lam**0.5 * torch.eye(C.shape[1], dtype=old.dtype, device=old.device)
        Q, R = torch.linalg.qr(torch.cat([rows, ridge]))
        change = torch.linalg.solve_triangular(R, Q[: len(rows)].T @ targets, upper=True)
    else:
        change = torch.linalg.pinv(rows) @ targets
    edited: Tensor = (old + change.T).to(W_o.dtype)
    return edited
