"""Flower messages <-> plain data. The only place that names record keys; `fedlora.traffic` knows their sizes.

A reply has the shape that Flower's own strategies expect: one ArrayRecord, and one MetricRecord whose
`num-examples` is the weight. What else a reply reports stands in a ConfigRecord beside them.

The sender of a message is not trusted: every number has a type and a range, and is held to both where it is read.
"""

import io
import json
import math
import sys
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeGuard

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from google.protobuf.message import DecodeError

from fedlora import compression
from fedlora.adapter import Adapter, Change, Instruction, Layout, Tensor, Update
from fedlora.compression import Codec
from fedlora.errors import ContractError, UserError
from fedlora.optimizers import averaged
from fedlora.privacy.accounting import UNSAID, Event
from fedlora.privacy.secure import Parts

HEADER = 512  # bytes in which an array says what it is
DIMENSIONS = 8  # of an array
PACKED = "fedlora."  # before the kind of a packed array, in the place where Flower names a serialiser
ARRAYS, METRICS, CONFIG, REPORT, MERGE = "arrays", "metrics", "config", "fedlora", "merge"
END = "end"  # the kind of query by which a site learns that a run has ended
SURVEY = "survey"  # the kind of query that asks for noised counts of its rows
SECURE, MOMENTS = "secure", "moments"
PARTS = ("you", "mask", "share", "sealed", "members", "masked", "sent", "dropped", "shares")  # of the exchanges
WEIGHT, ROUND = "num-examples", "server-round"
CLIENT_FAILED = 0  # flwr.app.ErrorCode.UNKNOWN
MOST_TERMS = 8  # on which a site may have paid in one run
MOST = 2**63 - 1  # that a whole number of a message may be, where nothing narrower is known
ABOVE_ZERO, FROM_ZERO = (
    ("clip-norm", "sum-noise"),
    ("count-noise", "proximal-mu"),
)  # words to clients: finite numbers


Packing = tuple[Codec, np.random.Generator]
"""How to write tensors in fewer bytes, and what the rounding is drawn from."""


def to_arrays(adapter: Mapping[str, Tensor], packing: Packing | None = None) -> ArrayRecord:
    """The tensors as an ArrayRecord: float32 as NumPy writes it, or packed."""
    if packing is None:
        return ArrayRecord({n: Array(np.ascontiguousarray(t, np.float32)) for n, t in adapter.items()})
    codec, rng = packing
    kind = f"{PACKED}{codec.kind}"
    return ArrayRecord({n: Array("float32", t.shape, kind, codec.encode(t, rng)) for n, t in adapter.items()})


def from_arrays(arrays: ArrayRecord) -> Adapter:
    """The tensors of an ArrayRecord, float32, packed or not.

    The sender says how large they are: nothing is allocated that is not there.

    Raises:
        ContractError: an array is not what `numpy.save` makes of real numbers, or not of the size it names.
    """
    return {name: _decoded(name, array) for name, array in arrays.items()}


def _decoded(name: str, array: Array) -> Tensor:
    if array.stype.startswith(PACKED):
        try:
            if len(array.shape) > DIMENSIONS or min(array.shape, default=1) < 0:
                raise ValueError(f"shape {array.shape}")
            return compression.decode(array.stype.removeprefix(PACKED), array.data, array.shape)
        except ValueError as error:
            raise ContractError(f"{name:.100} is no packed array: {error!s:.100}") from error
    stream = io.BytesIO(array.data)
    try:
        if array.stype != "numpy.ndarray" or np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("another format")
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=HEADER)
    except (ValueError, SyntaxError, TypeError, tokenize.TokenError, RecursionError) as error:
        raise ContractError(f"{name:.100} is no array: {error!s:.100}") from error
    body = memoryview(array.data)[stream.tell() :]
    real = dtype.kind == "f" and dtype.itemsize <= 8
    if not real or len(shape) > DIMENSIONS or min(shape, default=1) < 0 or shape != array.shape:
        raise ContractError(f"{name:.100} is an array of {dtype!s:.100}, shape {shape}, and not what it says")
    if math.prod(shape) * dtype.itemsize != len(body):
        raise ContractError(f"{name:.100} has shape {shape}, and {len(body)} bytes")
    flat = np.frombuffer(body, dtype)
    return np.asarray(flat.reshape(shape, order="F" if columns_first else "C"), np.float32)


def pack_instruction(instruction: Instruction, layout: Layout, packing: Packing | None = None) -> RecordDict:
    """An instruction as the content of a message."""
    config = ConfigRecord(dict(instruction.config))
    config[ROUND], config["frozen"] = instruction.round, instruction.frozen
    config["train"] = _mask(instruction.train, layout)
    config["send"] = _mask(instruction.send, layout)
    config["keep"] = _mask(instruction.keep, layout)
    config["draw"], config["trip"] = instruction.draw, instruction.trip
    if len(instruction.moments):
        config[MOMENTS] = _rows(instruction.moments)
    return RecordDict({ARRAYS: to_arrays(instruction.adapter, packing), CONFIG: config})


def unpack_instruction(content: RecordDict, layout: Layout, rounds: int = MOST, trips: int = MOST) -> Instruction:
    """What `pack_instruction` packed.

    A message of a stock Flower strategy names no tensors to train: then all that it sends are.

    Args:
        content: of the message.
        layout: of the adapter.
        rounds: of the run.
        trips: of a round.

    Raises:
        ContractError: a number is out of its range, or the message is of another adapter.
    """
    arrays, words = content.array_records, content.config_records
    if not arrays:
        raise ContractError("a message that asks for training holds no tensors")
    adapter = from_arrays(arrays[ARRAYS] if ARRAYS in arrays else next(iter(arrays.values())))
    config: dict[str, Any] = dict(words[CONFIG] if CONFIG in words else next(iter(words.values()), {}))
    for what in ABOVE_ZERO + FROM_ZERO:
        if what in config:
            config[what] = number(config[what], what, above_zero=what in ABOVE_ZERO)
    train, send = config.pop("train", None), config.pop("send", None)
    keep, frozen = config.pop("keep", None), config.pop("frozen", "")
    if not isinstance(frozen, str):
        raise ContractError("the fingerprint of the frozen tensors in a message is no text")
    trip = whole(config.pop("trip", 1), "trip", 1, trips)
    moments = _moments(config.pop(MOMENTS, b""))
    sent, trained = (tuple(sorted(adapter)) if mask is None else _unmask(mask, layout) for mask in (send, train))
    averaged.check(moments, len(sent) if len(moments) else 0)
    if len(moments) and not set(sent) <= set(trained):
        raise ContractError("a message has second moments of tensors that do not train")
    if trip == 1 and not set(adapter) <= set(layout):  # in later trips a strategy sends what it likes
        raise ContractError("the message holds tensors of another adapter")
    return Instruction(
        round=whole(config.pop(ROUND, 1), ROUND, 1, rounds),
        adapter=adapter,
        train=trained,
        send=sent,
        keep=() if keep is None else _unmask(keep, layout),
        frozen=frozen,
        draw=whole(config.pop("draw", 0), "draw", 0, rounds),
        trip=trip,
        config=config,
        moments=moments,
    )


def whole(value: object, what: str, least: int, most: int) -> int:
    """A whole number of a message.

    Raises:
        ContractError: it is none, or out of its range.
    """
    if type(value) is not int or not least <= value <= most:
        raise ContractError(f"{what} in a message is a whole number from {least} to {most}, not {value!r:.40}")
    return value


def number(value: object, what: str, above_zero: bool = False) -> float:
    """A finite number of a message, from 0 or above.

    Raises:
        ContractError: it is none.
    """
    if _real(value) and 0 <= value <= sys.float_info.max and (value or not above_zero):
        return float(value)
    least = "above 0" if above_zero else "from 0"
    raise ContractError(f"{what} in a message is a finite number {least}, not {value!r:.40}")


def figure(value: object, what: str) -> float | None:
    """A finite number of a message of any sign, or None.

    Raises:
        ContractError: it is neither.
    """
    if value is None or (_real(value) and abs(value) <= sys.float_info.max):
        return None if value is None else float(value)
    raise ContractError(f"{what} in a message is a finite number or null, not {value!r:.40}")


def _real(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def pack_update(update: Update, event: Event | None = None, packing: Packing | None = None) -> RecordDict:
    """An update as the content of a reply, with the privacy event that it cost."""
    metrics = MetricRecord({WEIGHT: update.weight, **{k: float(v) for k, v in update.metrics.items()}})
    content = RecordDict({ARRAYS: to_arrays(update.adapter, packing), METRICS: metrics})
    if event is not None:
        content[REPORT] = ConfigRecord({"privacy": json.dumps(event.to_json())})
    if len(update.moments):
        content[MOMENTS] = ConfigRecord({MOMENTS: _rows(update.moments)})
    return content


def unpack_update(content: RecordDict, client: int) -> Update:
    """The update in a reply, from any sender; what it claims is for `fedlora.engine.intake` to judge.

    Raises:
        ContractError: the reply lacks tensors, or its weight is no positive number.
    """
    metrics: dict[str, Any] = dict(next(iter(content.metric_records.values()), {}))
    weight = metrics.pop(WEIGHT, None)
    if not _real(weight) or not 0 < weight < math.inf or not content.array_records:
        raise ContractError(f"the reply of client {client} has no tensors or no positive {WEIGHT!r}")
    return Update(
        adapter=from_arrays(next(iter(content.array_records.values()))),
        weight=float(weight),
        clients=(client,),
        metrics={k: float(v) for k, v in metrics.items() if _real(v)},
        moments=_moments(dict(content.config_records.get(MOMENTS, {})).get(MOMENTS, b"")),
    )


def _rows(moments: Tensor) -> bytes:
    return moments.astype("<f4").tobytes()


def _moments(data: object) -> Tensor:
    if not isinstance(data, bytes) or len(data) % 8:
        raise ContractError("the second moments in a message are no rows of two numbers")
    return np.frombuffer(data, "<f4").astype(np.float32).reshape(-1, 2)


def unpack_event(content: RecordDict) -> Event | None:
    """The privacy event that a reply cost; None where it names none.

    Raises:
        ContractError: it is garbled.
    """
    told = _report(content).get("privacy")
    return None if told is None else read_event(_json(told))


def unpack_spent(content: RecordDict) -> tuple[tuple[Event, ...] | None, bool]:
    """All that a site has paid in a run, as its own ledger has it, and whether its answer is an earlier one.

    Returns:
        Events, None where a reply does not say.

    Raises:
        ContractError: it is garbled.
    """
    words = unpack_words(content)
    told, again = words.get("spent"), words.get("again") is True
    if told is None:
        return None, again
    events = [read_event(one) for one in told] if isinstance(told, list) and len(told) <= MOST_TERMS else [None]
    if not all(events):
        raise ContractError("a message garbles what its site has paid in the run")
    return tuple(event for event in events if event), again


def read_event(told: Any) -> Event | None:
    """A privacy event from what a client wrote; None from null.

    Raises:
        ContractError: it is garbled.
    """
    try:
        if told is None:
            return None
        told = {**UNSAID, **told}
        if strange := [field.name for field in fields(Event) if not _real(told[field.name])]:
            raise ValueError(strange[0])
        return Event.from_json(told)
    except (KeyError, TypeError, ValueError, OverflowError, UserError) as error:
        raise ContractError(f"a message lacks or garbles {error} of its privacy event") from error


def pack_words(words: Mapping[str, Any]) -> RecordDict:
    """JSON values by name as the content of a message between the server and a site, without tensors."""
    return RecordDict({REPORT: ConfigRecord({key: json.dumps(value) for key, value in words.items()})})


def add_words(content: RecordDict, words: Mapping[str, Any]) -> None:
    """Put further words into the content of a message, or replace those of the same names."""
    content[REPORT] = ConfigRecord(
        {**_report(content), **{key: json.dumps(value) for key, value in words.items()}}
    )


def unpack_words(content: RecordDict) -> dict[str, Any]:
    """What `pack_words` packed; empty where there is none of it.

    Raises:
        ContractError: a value is not JSON.
    """
    return {key: _json(value) for key, value in _report(content).items()}


def pack_merges(content: RecordDict, first: int, changes: Sequence[Change]) -> None:
    """Put merges beside an instruction, for a site that lacks them: those from number `first` on."""
    for number, change in enumerate(changes, first):
        content[f"{MERGE}-{number}"] = pairs(change)


def unpack_merges(content: RecordDict, weights: Mapping[str, tuple[int, ...]]) -> dict[int, Change]:
    """What `pack_merges` put there, by number.

    Args:
        content: of the message.
        weights: the shape of each layer that may change, (out, in).

    Raises:
        ContractError: it put no such thing there.
    """
    found: dict[int, Change] = {}
    for key, arrays in content.array_records.items():
        prefix, _, digits = key.partition("-")
        if prefix != MERGE:
            continue
        found[_digits(digits, f"the number of {MERGE}")] = unpaired(key, arrays, weights)
    return found


def pairs(change: Change) -> ArrayRecord:
    """Pairs of factors by the name of a layer, as an ArrayRecord."""
    return to_arrays({f"{m}/{i}": side for m, pair in change.items() for i, side in enumerate(pair)})


def unpaired(key: str, arrays: ArrayRecord, weights: Mapping[str, tuple[int, ...]]) -> Change:
    """What `pairs` made, for layers of these shapes, (out, in).

    Raises:
        ContractError: it is of other layers.
    """
    sides, change = from_arrays(arrays), {}
    for module in {name.rpartition("/")[0] for name in sides}:
        left, right = (sides.pop(f"{module}/{i}", np.empty(0, np.float32)) for i in range(2))
        fits = left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]
        if not fits or (left.shape[0], right.shape[1]) != weights.get(module):
            raise ContractError(f"{key:.40} in a message is of another model")
        change[module] = (left, right)
    if sides:
        raise ContractError(f"{key:.40} in a message is of another model")
    return dict(sorted(change.items()))


def pack_parts(parts: Parts) -> RecordDict:
    """What one side says in an exchange of secure aggregation, as the content of a message."""
    return RecordDict(
        {
            SECURE: ConfigRecord(
                {f"{what}/{client}": value for what, of in parts.items() for client, value in of.items()}
            )
        }
    )


def unpack_parts(content: RecordDict) -> dict[str, dict[int, bytes]]:
    """What `pack_parts` packed.

    Raises:
        ContractError: it did not pack that.
    """
    parts: dict[str, dict[int, bytes]] = {what: {} for what in PARTS}
    for key, value in content.config_records.get(SECURE, {}).items():
        what, _, client = key.partition("/")
        if what not in parts or not isinstance(value, bytes):
            raise ContractError(f"a message of secure aggregation holds {key!r:.100}")
        parts[what][_digits(client, f"who {what} is of")] = value
    return parts


def to_bytes(content: RecordDict) -> bytes:
    """A message's content as Flower serialises it."""
    return bytes(recorddict_to_proto(content).SerializeToString())


def from_bytes(data: bytes) -> RecordDict:
    """What `to_bytes` made.

    Raises:
        ContractError: it did not make that.
    """
    try:
        return recorddict_from_proto(ProtoRecordDict.FromString(data))
    except (AttributeError, DecodeError, KeyError, TypeError, ValueError) as error:  # what Flower trips over
        raise ContractError(f"no message of Flower's: {error!s:.100}") from error


def _digits(text: str, what: str) -> int:
    """A whole number that is written as the end of a key, in one way."""
    if len(text) <= len(str(MOST)) and text.isascii() and text.isdecimal() and str(int(text)) == text:
        return whole(int(text), what, 0, MOST)
    raise ContractError(f"{what} in a message is a whole number, not {text!r:.40}")


def _report(content: RecordDict) -> Mapping[str, Any]:
    return content.config_records.get(REPORT, {})


def _json(text: object) -> Any:
    try:
        return json.loads(str(text))
    except (ValueError, RecursionError) as error:
        raise ContractError("a message holds what is not JSON") from error


def error_reply(to: Message, reason: str) -> Message:
    """The reply of a client that failed."""
    return Message(Error(CLIENT_FAILED, reason), reply_to=to)


def _mask(names: Iterable[str], layout: Layout) -> bytes:
    chosen = set(names)
    return np.packbits([name in chosen for name in sorted(layout)]).tobytes()


def _unmask(mask: object, layout: Layout) -> tuple[str, ...]:
    names = sorted(layout)
    if not isinstance(mask, bytes) or len(mask) != -(-len(names) // 8):
        raise ContractError("the message names tensors of another adapter")
    bits = np.unpackbits(np.frombuffer(mask, np.uint8))[: len(names)]
    return tuple(name for name, bit in zip(names, bits, strict=True) if bit)
