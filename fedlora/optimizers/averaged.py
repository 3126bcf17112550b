"""Second moments that clients share: `state: averaged`, after DP-FedAdamW (https://arxiv.org/abs/2602.19945).

What travels of each tensor is a row of two numbers: the mean over the tensor's numbers of the second moment as it
is before its bias is corrected, and the weight of gradients in it, `1 - b2^t` after t steps. Their quotient is the
second moment. Both are linear in what clients did, so that the mean of rows, weighted as updates are, weighs
each client's second moment by its steps too. One number for a whole tensor, the paper's block, varies less between
clients and rounds than one for each of its numbers, and a row takes eight bytes. First moments begin at zero in
each round, as in the paper.

Rows are a function of gradients that hold their noise already, so that they cost no epsilon. With `correct_noise`
each client takes the variance of its own noise out of the mean over a tensor, and leaves the floor at least:
clients of unequal noise then have one mean, to which each adds its own noise again before it corrects, and none
steps by a second moment below its own floor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedlora.adapter import Adapter, Sum, Tensor, Update
from fedlora.errors import ContractError

ROUNDING = 1e-4  # by which float32 may make a mean of weights of 1 longer, over thousands of clients
LARGEST = 1e24  # of a second moment: of gradients as long as what `fedlora.engine.intake` calls enormous


def rows(held: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """The rows of some tensors, (tensors, 2); zeros where nobody has stepped yet."""
    found = [held.get(name, np.zeros(2, np.float32)) for name in names]
    return np.array(found, np.float32).reshape(len(names), 2)


def mean(names: Sequence[str], updates: Sequence[Update]) -> Adapter:
    """The row of each tensor after a round, by name: the mean over clients, weighted as their updates are.

    Args:
        names: of the tensors that clients sent.
        updates: at least one.
    """
    total, made = Sum(), updates[0].moments
    for update in updates:
        total.add(replace(update, adapter={}))
    if len(updates) > 1:  # in the arithmetic of sums on the way, of which one update is that already
        made = total.moments / np.float32(total.weight)
    made = np.minimum(made, np.array([np.inf, 1.0], np.float32))
    return dict(zip(names, made, strict=True))


def check(moments: Tensor, count: int) -> None:
    """Refuse rows that are not those of so many tensors, or that no training makes.

    Raises:
        ContractError: another shape or type, or numbers out of their range.
    """
    if not isinstance(moments, np.ndarray) or moments.dtype != np.float32 or moments.shape != (count, 2):
        raise ContractError(f"second moments are {count} rows of two numbers of float32, and these are not")
    second, weight = moments[:, 0], moments[:, 1]
    if not (np.all((second >= 0) & (second <= LARGEST)) and np.all((weight >= 0) & (weight <= 1 + ROUNDING))):
        raise ContractError(f"second moments are from 0 to {LARGEST:g}, their weights to 1, and these are not")
