"""Bytes of messages between a server and its clients, as Flower serialises them."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from fedlora import wire, wire_base
from fedlora.adapter import Instruction, Layout, Tensor, Update
from fedlora.compression import Codec
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms.statistic import numbers
from fedlora.seeding import generator

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def content_bytes(content: RecordDict) -> int:
    """Bytes of a message's content as Flower serialises it."""
    return _size(content)


def instruction_bytes(instruction: Instruction, layout: Layout, codec: Codec | None = None) -> int:
    """Bytes of an instruction as Flower serialises it."""
    empty = replace(instruction, adapter={}, ranked={})
    return _size(wire.pack_instruction(empty, layout)) + _arrays_bytes(_shapes(instruction.adapter), codec)


def update_bytes(update: Update, event: Event | None = None, codec: Codec | None = None) -> int:
    """Bytes of an update as Flower serialises it."""
    return _words_bytes(tuple(update.metrics), event, len(update.moments)) + _arrays_bytes(
        _shapes(update.adapter), codec
    )


def tensor_bytes(names: Iterable[str], layout: Layout, codec: Codec | None = None) -> int:
    """Bytes that the named tensors add to a message."""
    return arrays_bytes({name: layout[name].shape for name in names}, codec)


def arrays_bytes(shapes: Mapping[str, tuple[int, ...]], codec: Codec | None = None) -> int:
    """Bytes that tensors of these shapes add to a message."""
    return _arrays_bytes(tuple(shapes.items()), codec)


def statistic_bytes(shapes: Mapping[str, tuple[int, ...]], event: Event | None) -> int:
    """Bytes of a client's statistic, whose sums have these shapes: of a symmetric one half is sent."""
    sums = {name: (numbers(shape),) for name, shape in shapes.items()}
    return _size(wire_base.pack_statistic({}, event)) + arrays_bytes(sums)


def _shapes(adapter: Mapping[str, Tensor]) -> Shapes:
    return tuple((name, tensor.shape) for name, tensor in adapter.items())


@lru_cache(maxsize=4096)
def _words_bytes(metrics: tuple[str, ...], event: Event | None, rows: int) -> int:
    """What an update weighs without tensors: a figure takes eight bytes, whatever it is, and so does a row."""
    moments, figures = np.zeros((rows, 2), np.float32), dict.fromkeys(metrics, 1.0)
    return _size(
        wire.pack_update(Update(adapter={}, weight=1.0, clients=(), metrics=figures, moments=moments), event)
    )


@lru_cache(maxsize=256)
def _arrays_bytes(shapes: Shapes, codec: Codec | None = None) -> int:
    """What tensors of these shapes add to a message: measured once on zeros, as size is all that counts."""
    packing = None if codec is None else (codec, generator(0, "size"))
    record = wire.to_arrays({name: np.zeros(shape, np.float32) for name, shape in shapes}, packing)
    return _size(RecordDict({wire.ARRAYS: record})) - _size(RecordDict({wire.ARRAYS: ArrayRecord()}))


def _size(content: RecordDict) -> int:
    return int(recorddict_to_proto(content).ByteSize())
