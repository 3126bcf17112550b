"""What clients' changes average to, and how far an aggregate is from that."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Change, Layout, Tensor, Update
from fedlora.kinds.contract import Kind
from fedlora.kinds.lora import Lora
from fedlora.lazy import Lazy, Thin, Total, norm

PLAIN = Lora(1, 1.0, ())
"""LoRA with a scaling of 1."""


def shares(
    kind: Kind, layout: Layout, held: Mapping[str, Tensor], updates: Sequence[Update]
) -> dict[str, list[tuple[float, NDArray[np.floating], NDArray[np.floating]]]]:
    """The terms `p_k s_k`, left_k and right_k of the average change of each layer, for `factors.stack`.

    Args:
        kind: of the adapter.
        layout: says which tensors go together.
        held: stands in for tensors that clients did not send.
        updates: one for each client.
    """
    total = sum(u.weight for u in updates)
    parts: dict[str, list[tuple[float, NDArray[np.floating], NDArray[np.floating]]]] = {}
    for update in updates:
        for module, pair in kind.change(layout, {**held, **update.adapter}).items():
            parts.setdefault(module, []).append((update.weight / total * update.scaling, *pair))
    return parts


def aggregation_error(
    layout: Layout,
    sent: Mapping[str, Tensor],
    updates: Sequence[Update],
    after: Mapping[str, Tensor],
    *,
    kind: Kind = PLAIN,
    merge: Change | None = None,
) -> float:
    """How far the aggregate is from averaging the full weight changes.

    `|| s_hat B_hat A_hat + merge - ideal ||_F / || ideal ||_F`, over all layers together, with
    `ideal = sum_k p_k s_k B_k A_k`. Computed through QR of the stacked thin factors, in float64; for a change that
    has none a block of columns at a time.

    Args:
        layout: says which tensors pair up.
        sent: what the clients started from; stands in for factors that they did not send.
        updates: one for each client.
        after: what the strategy made of them, over all tensors of `sent`.
        kind: of the adapter; by default LoRA with a scaling of 1.
        merge: what the strategy folded into the base in the same round.

    Returns:
        The error, 0 where the ideal change is 0.
    """
    ideal = wrong = 0.0
    total = sum(u.weight for u in updates)
    parts: dict[str, list[tuple[float, Lazy]]] = {}
    for update in updates:
        for module, change in kind.lazy(layout, {**sent, **update.adapter}).items():
            parts.setdefault(module, []).append((update.weight / total * update.scaling, change))
    made = kind.lazy(layout, after)
    for module, terms in parts.items():
        ideal += norm(Total(terms)) ** 2
        more = [(-1.0, Thin(*merge[module]))] if merge and module in merge else []
        wrong += norm(Total([*terms, (-kind.scaling(), made[module]), *more])) ** 2
    return float(np.sqrt(wrong / ideal)) if ideal > 0 else 0.0
