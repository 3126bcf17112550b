"""Updates of unequal ranks, each number averaged over those who trained it.

A client of rank r_k trains the first r_k columns of B, or rows and columns of a core, at the scaling s_k of its
rank. With its weight w_k, and s the server's scaling, number i of what the change is linear in becomes

    x_i = sum_k w_k (s_k / s) x_ki / W_i,   W_i = sum_k w_k   over the clients k that hold i

and what nobody holds stays. If x_ki carries noise of standard deviation t_k, x_i has
`sqrt(sum_k (w_k (s_k / s) t_k)^2) / W_i`: the fewer hold it, the more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Layout, Tensor, Update
from fedlora.kinds.contract import Kind


def part(shape: Sequence[int]) -> tuple[slice, ...]:
    """The first numbers of a larger tensor, as many as a shape has."""
    return tuple(map(slice, shape))


def levelled(
    kind: Kind,
    layout: Layout,
    before: Mapping[str, Tensor],
    updates: Sequence[Update],
    rank: Callable[[Update], int],
) -> list[Update]:
    """Updates of the server's rank whose weighted mean is, of each number, the mean over those who hold it.

    Args:
        kind: of the adapter.
        layout: of the adapter.
        before: what the server sent, at its own rank.
        updates: as clients sent them.
        rank: of the clients of an update.
    """
    total = sum(update.weight for update in updates)
    holds: dict[str, NDArray[np.float64]] = {}  # W of each number
    for update in updates:
        for name, tensor in update.adapter.items():
            holds.setdefault(name, np.zeros(layout[name].shape))[part(tensor.shape)] += update.weight
    made = []
    for update in updates:
        ratio, adapter = kind.scaling(rank(update)) / kind.scaling(), {}
        for name, tensor in update.adapter.items():
            held, own = holds[name], part(tensor.shape)
            whole = np.where(held > 0, 0.0, before[name])
            scale = ratio if kind.counts(layout[name].role) else 1.0
            whole[own] = tensor * (scale * total / held[own])
            adapter[name] = whole.astype(np.float32)
        made.append(replace(update, adapter=adapter, scaling=kind.scaling()))
    return made
