"""Which clients change a layer in the same directions: groups by the principal angles between their changes.

A client's change of a layer in a round is `dW_k = U_k S_k V_k^T`, and Q_k are the first columns of U_k that hold
most of its energy. With t_i the principal angles between the spaces of two clients, their overlap in the layer is

    || Q_k^T Q_l ||_F^2 / min(q_k, q_l) = sum_i cos(t_i)^2 / min(q_k, q_l)

It is 1 where one space holds the other, and on average q / out where directions are by chance. Its mean over
layers joins clients: by average linkage, as long as two groups overlap by `LEAST`. Sub-MoE merges experts in their
shared subspace (https://arxiv.org/abs/2506.23266); here nothing is merged, and the groups are a figure.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedlora import factors
from fedlora.adapter import Layout, Tensor, Update
from fedlora.factors import Matrix
from fedlora.kinds.contract import Kind

ENERGY = 0.9  # of a change, in the directions that are compared
LEAST = 0.5  # overlap of two groups that are joined
MOST = 200  # clients that are compared: the time grows with their square


def groups(kind: Kind, layout: Layout, before: Mapping[str, Tensor], updates: Sequence[Update]) -> list[list[int]]:
    """Clients in groups, each ascending, by the first of each; empty where they cannot be compared.

    Args:
        kind: of the adapter.
        layout: of the adapter.
        before: every tensor that clients started from.
        updates: of one client each, at the adapter's own rank.
    """
    alike = all(t.shape == before[n].shape for update in updates for n, t in update.adapter.items())
    if not 2 < len(updates) <= MOST or not alike or any(len(update.clients) != 1 for update in updates):
        return []
    start = kind.change(layout, before)
    spaces = []
    for update in updates:
        made = kind.change(layout, {**before, **update.adapter})
        parts = {m: factors.stack([(1.0, *made[m]), (-1.0, *start[m])]) for m in made}
        spaces.append({module: _space(*pair) for module, pair in parts.items()})
    clients = np.array([update.clients[0] for update in updates])
    joined = _joined(np.array([[overlap(one, other) for other in spaces] for one in spaces]))
    made_of = [sorted(int(c) for c in clients[joined == group]) for group in np.unique(joined)]
    return sorted(made_of)


def overlap(one: Mapping[str, Matrix], other: Mapping[str, Matrix]) -> float:
    """The mean over layers of how far two clients' spaces overlap, in [0, 1]; over those that both changed.

    Args:
        one: by layer an orthonormal basis, (out, q).
        other: likewise.
    """
    both = [(one[m], other[m]) for m in one.keys() & other.keys() if one[m].shape[1] and other[m].shape[1]]
    shares = [float(((q.T @ p) ** 2).sum()) / min(q.shape[1], p.shape[1]) for q, p in both]
    return float(np.mean(shares)) if shares else 0.0


def _space(left: NDArray[np.floating], right: NDArray[np.floating]) -> Matrix:
    """An orthonormal basis of the outputs of `left right` that hold most of its energy, (out, q)."""
    u, s, _ = factors.svd(left, right)
    return u[:, : factors.energy_rank(s, ENERGY)]


def _joined(overlaps: Matrix) -> NDArray[np.int64]:
    """The group of each client by average linkage, (clients,)."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    away = np.clip(1.0 - overlaps, 0.0, None)
    np.fill_diagonal(away, 0.0)
    tree = linkage(squareform(away, checks=False), method="average")
    found: NDArray[np.int64] = fcluster(tree, 1.0 - LEAST, criterion="distance").astype(np.int64)
    return found
