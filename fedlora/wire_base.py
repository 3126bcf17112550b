"""Flower messages <-> what is said of the frozen base before a run trains: a statistic of rows, and the cut."""

from collections.abc import Mapping

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from numpy.typing import NDArray

from fedlora import wire
from fedlora.adapter import Change
from fedlora.errors import ContractError
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms.statistic import flat, unflat

STATISTIC = "statistic"  # the kind of query that asks for a noised statistic
CUT = "cut"  # beside an introduction: the factors, and by which mark a site knows them


def pack_statistic(sums: Mapping[str, NDArray[np.float64]], event: Event | None) -> RecordDict:
    """The noised sums of a client as the content of a reply, with the privacy event that they cost."""
    content = wire.pack_words({} if event is None else {"privacy": event.to_json()})
    content[wire.ARRAYS] = wire.to_arrays({name: flat(values).astype(np.float32) for name, values in sums.items()})
    return content


def unpack_statistic(content: RecordDict, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[np.float64]]:
    """What `pack_statistic` packed.

    Args:
        content: of the reply.
        shapes: of the sums that are to be in it, (in,) or symmetric (in, in).

    Raises:
        ContractError: there are others, or numbers that are not finite.
    """
    sent = wire.from_arrays(content.array_records.get(wire.ARRAYS, ArrayRecord()))
    if sent.keys() != shapes.keys():
        raise ContractError("a message holds a statistic of other layers")
    return {name: unflat(sent[name], shape) for name, shape in shapes.items()}


def pack_cut(content: RecordDict, factors: Change) -> None:
    """Put the factors of a base that was cut beside an introduction, by the names of its layers."""
    content[CUT] = wire.pairs(factors)


def unpack_cut(content: RecordDict, weights: Mapping[str, tuple[int, ...]]) -> Change | None:
    """What `pack_cut` put there; None where nothing is. The arguments and errors are those of `wire.unpaired`."""
    arrays = content.array_records.get(CUT)
    return None if arrays is None else wire.unpaired(CUT, arrays, weights)
