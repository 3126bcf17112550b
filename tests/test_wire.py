import io
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given
from hypothesis import strategies as st

from fedlora import traffic, wire
from fedlora.adapter import Instruction, Slot, Update
from fedlora.errors import ContractError
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms import central

LAYOUT = {n: Slot(n, (3, 2), "B", n) for n in "abcdefghij"}
EVENT = Event(noise_multiplier=1.25, sample_rate=0.1, steps=3, clip_norm=1.0)


def tensors(names, rng=None):
    rng = rng or np.random.default_rng(0)
    return {n: rng.normal(size=(3, 2)).astype(np.float32) for n in names}


def over_the_wire(content: RecordDict) -> RecordDict:
    from flwr.proto.recorddict_pb2 import RecordDict as Proto

    return recorddict_from_proto(Proto.FromString(recorddict_to_proto(content).SerializeToString()))


@given(st.sets(st.sampled_from(sorted(LAYOUT))), st.sets(st.sampled_from(sorted(LAYOUT))), st.integers(1, 9999))
def test_an_instruction_survives_the_wire(train, down, round):
    sent = Instruction(
        round=round,
        adapter=tensors(sorted(down)),
        train=tuple(sorted(train)),
        send=tuple(sorted(train & down)),
        config={"proximal-mu": 0.5},
        frozen="0123456789abcdef",
        moments=np.random.default_rng(1).random((len(train & down), 2), np.float32),
    )
    content = wire.pack_instruction(sent, LAYOUT)
    got = wire.unpack_instruction(over_the_wire(content), LAYOUT)
    np.testing.assert_array_equal(got.moments, sent.moments)
    assert replace(got, adapter={}) == replace(sent, adapter={})
    for name, tensor in sent.adapter.items():
        np.testing.assert_array_equal(got.adapter[name], tensor)
    assert traffic.instruction_bytes(sent, LAYOUT) == pytest.approx(
        len(recorddict_to_proto(content).SerializeToString()), abs=6
    )


@pytest.mark.parametrize("event", [None, EVENT])
@pytest.mark.parametrize("names", ["a", "abcdefghij"])
def test_update_bytes_are_those_of_the_serialised_reply(names, event):
    update = Update(adapter=tensors(names), weight=12.0, clients=(3,), metrics={"train_loss": 0.5})
    size = len(recorddict_to_proto(wire.pack_update(update, event)).SerializeToString())
    assert traffic.update_bytes(update, event) == pytest.approx(size, abs=6)
    update = replace(update, moments=np.ones((len(names), 2), np.float32))
    size = len(recorddict_to_proto(wire.pack_update(update, event)).SerializeToString())
    assert traffic.update_bytes(update, event) == pytest.approx(size, abs=6)  # lengths are written in 1 to 5 bytes


def test_an_update_survives_the_wire(engine_identity):
    rows = np.array([[1e-7, 0.1], [3, 1]], np.float32)
    update = Update(adapter=tensors("ab"), weight=12.0, clients=(3,), metrics={"train_loss": 0.5}, moments=rows)
    got = wire.unpack_update(over_the_wire(wire.pack_update(update, EVENT)), 3)
    assert (got.weight, got.clients, got.metrics) == (12.0, (3,), {"train_loss": 0.5})
    np.testing.assert_array_equal(got.adapter["b"], update.adapter["b"])
    np.testing.assert_array_equal(got.moments, rows)


@pytest.mark.parametrize("weight", [None, 0.0, -1.0, float("nan"), float("inf")])
def test_a_reply_without_a_positive_weight_is_refused(engine_identity, weight):
    content = wire.pack_update(Update(adapter=tensors("a"), weight=1.0, clients=(0,)))
    content[wire.METRICS] = MetricRecord({} if weight is None else {wire.WEIGHT: weight})
    with pytest.raises(ContractError, match="client 0"):
        wire.unpack_update(content, 0)


GOOD = Array(np.ones((2, 3), np.float32))


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (Array("float32", (2, 3), "pickle", GOOD.data), "another format"),
        (Array("float32", (3, 2), "numpy.ndarray", GOOD.data), "not what it says"),
        (Array("object", (1,), "numpy.ndarray", npy(np.array([{}], object))), "array of object"),
        (Array("int64", (1,), "numpy.ndarray", npy(np.array([1]))), "array of int64"),
        (Array("<U5", (1,), "numpy.ndarray", npy(np.array(["words"]))), "array of <U5"),
        (Array("float32", (2, 3), "numpy.ndarray", GOOD.data[:-1]), "has shape .* and 23 bytes"),
        (Array("float32", (2, 3), "numpy.ndarray", GOOD.data + b"x"), "has shape .* and 25 bytes"),
        (Array("float32", (2, 3), "numpy.ndarray", b""), "is no array"),
        (Array("float32", (2, 3), "numpy.ndarray", b"PK\x03\x04" + GOOD.data), "is no array"),  # no archives
        (
            Array("float32", (2**40,), "numpy.ndarray", GOOD.data.replace(b"(2, 3), }  ", b"(1099511627776,), }")),
            "is no array|has shape",
        ),
    ],
)
def test_an_array_is_what_it_says_or_is_refused(array, words):
    with pytest.raises(ContractError, match=words):
        wire.from_arrays(ArrayRecord({"a": array}))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_real_numbers_are_read_in_either_order(dtype, order):
    array = np.array([[1, 2, 3], [4, 5, 6]], dtype, order=order)
    got = wire.from_arrays(ArrayRecord({"a": Array(array), "scalar": Array(np.array(2.5, dtype))}))
    np.testing.assert_array_equal(got["a"], np.array([[1, 2, 3], [4, 5, 6]], np.float32))
    assert got["scalar"] == np.float32(2.5) and got["a"].dtype == np.float32


@pytest.mark.parametrize("moments", [b"1234567", b"", "text", np.float32([1, 2]).tobytes(), b"\0" * 16])
def test_second_moments_are_rows_of_what_is_sent(moments):
    told = Instruction(round=1, adapter={}, train=("a",), send=("a",), moments=np.full((1, 2), 0.5, np.float32))
    content = wire.pack_instruction(told, LAYOUT)
    content[wire.CONFIG][wire.MOMENTS] = moments
    if moments == b"":
        assert wire.unpack_instruction(content, LAYOUT).moments.shape == (0, 2)
    else:
        with pytest.raises(ContractError, match="second moments"):
            wire.unpack_instruction(content, LAYOUT)


def test_second_moments_are_of_what_trains():
    """Else a training that was paid for would fail."""
    told = Instruction(round=1, adapter={}, train=("a",), send=("a",), moments=np.full((1, 2), 0.5, np.float32))
    content = wire.pack_instruction(told, LAYOUT)
    content[wire.CONFIG]["train"] = wire.pack_instruction(replace(told, train=()), LAYOUT)[wire.CONFIG]["train"]
    with pytest.raises(ContractError, match="second moments of tensors that do not train"):
        wire.unpack_instruction(content, LAYOUT)


def test_a_mask_of_another_adapter_is_refused():
    content = wire.pack_instruction(Instruction(round=1, adapter={}, train=("a",), send=("a",)), LAYOUT)
    with pytest.raises(ContractError, match="another adapter"):
        wire.unpack_instruction(content, {"a": LAYOUT["a"]})


@pytest.fixture
def engine_identity():
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1


def test_a_record_whose_value_holds_nothing_is_no_message():
    """Found by `tests.faults.guided`: Flower's own reader trips over it."""
    proto = recorddict_to_proto(wire.pack_words({"run": "a"}))
    proto.items[0].config_record.items[0].value.Clear()
    with pytest.raises(ContractError, match=r"^no message of Flower's: "):
        wire.from_bytes(proto.SerializeToString())


HUGE = 2**63 - 1


def asked(**words):
    """A message that asks for training, with words of the test's own."""
    content = wire.pack_instruction(Instruction(round=1, adapter=tensors("a"), train=("a",), send=("a",)), LAYOUT)
    for key, value in words.items():
        content[wire.CONFIG][key.replace("_", "-")] = value
    return content


@pytest.mark.parametrize("what", ["server_round", "trip", "draw"])
@pytest.mark.parametrize("value", [-1, 0, 3, HUGE, 1.0, True, "1", b"1", [1]])
def test_whole_numbers_of_an_instruction_have_a_type_and_a_range(what, value):
    fits = type(value) is int and (value in (0,) if what == "draw" else False)
    told = asked(**{what: value})
    if fits:
        assert wire.unpack_instruction(told, LAYOUT, rounds=2, trips=2).draw == value
        return
    with pytest.raises(
        ContractError, match=rf"^{what.replace('_', '-')} in a message is a whole number from [01] to"
    ):
        wire.unpack_instruction(told, LAYOUT, rounds=2, trips=2)


@pytest.mark.parametrize("what", ["clip_norm", "sum_noise", "count_noise", "proximal_mu"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1", True, b"1"])
def test_numbers_of_an_instruction_are_finite_and_not_below_zero(what, value):
    with pytest.raises(ContractError, match="in a message is a finite number"):
        wire.unpack_instruction(asked(**{what: value}), LAYOUT)
    assert wire.unpack_instruction(asked(**{what: 2}), LAYOUT).config[what.replace("_", "-")] == 2.0


def test_the_words_of_a_server_that_protects_are_among_those_that_are_checked():
    assert {central.CLIP_NORM, central.SUM_NOISE} == set(wire.ABOVE_ZERO) and central.COUNT_NOISE in wire.FROM_ZERO


@pytest.mark.parametrize("what", ["clip_norm", "sum_noise"])
def test_a_bound_and_the_noise_on_it_are_above_zero(what):
    with pytest.raises(ContractError, match="a finite number above 0"):
        wire.unpack_instruction(asked(**{what: 0.0}), LAYOUT)


def test_tensors_of_another_adapter_are_refused_and_so_is_a_message_without_any():
    told = asked()
    told[wire.ARRAYS] = wire.to_arrays({"strange": np.ones(3, np.float32)})
    with pytest.raises(ContractError, match="tensors of another adapter"):
        wire.unpack_instruction(told, LAYOUT)
    with pytest.raises(ContractError, match="holds no tensors"):
        wire.unpack_instruction(RecordDict(), LAYOUT)


def test_a_message_of_a_stock_strategy_is_of_the_first_trip_and_draw():
    stock = RecordDict({"arrays": wire.to_arrays(tensors("ab")), "config": ConfigRecord({"server-round": 2})})
    got = wire.unpack_instruction(stock, LAYOUT, rounds=2, trips=1)
    assert (got.round, got.trip, got.draw, got.train, got.send) == (2, 1, 0, ("a", "b"), ("a", "b"))


WEIGHTS = {"layer": (3, 2)}


@pytest.mark.parametrize(
    "key, sides",
    [
        ("merge-x", {"layer/0": (3, 1), "layer/1": (1, 2)}),
        ("merge--1", {"layer/0": (3, 1), "layer/1": (1, 2)}),
        ("merge-01", {"layer/0": (3, 1), "layer/1": (1, 2)}),
        ("merge-²", {"layer/0": (3, 1), "layer/1": (1, 2)}),
        ("merge-" + "9" * 5000, {"layer/0": (3, 1), "layer/1": (1, 2)}),
        ("merge-0", {"layer/0": (3, 1)}),
        ("merge-0", {"layer/0": (3, 1), "layer/1": (2, 2)}),
        ("merge-0", {"layer/0": (2, 1), "layer/1": (1, 2)}),
        ("merge-0", {"other/0": (3, 1), "other/1": (1, 2)}),
        ("merge-0", {"layer/0": (3, 1), "layer/1": (1, 2), "layer/2": (1, 2)}),
        ("merge-0", {"layer": (3, 1)}),
    ],
)
def test_a_merge_that_is_none_of_this_model_is_refused(key, sides):
    content = RecordDict({key: wire.to_arrays({n: np.ones(shape, np.float32) for n, shape in sides.items()})})
    with pytest.raises(ContractError, match="in a message is"):
        wire.unpack_merges(content, WEIGHTS)


def test_merges_survive_the_wire_by_number():
    content, change = RecordDict(), {"layer": (np.ones((3, 1), np.float32), np.ones((1, 2), np.float32))}
    wire.pack_merges(content, 4, [change, change])
    assert sorted(wire.unpack_merges(over_the_wire(content), WEIGHTS)) == [4, 5]


@pytest.mark.parametrize("key", ["sent/x", "sent/-1", "sent/01", "sent/²", "sent/" + "9" * 5000, "sent/", "sent"])
def test_who_an_exchange_is_about_is_a_whole_number(key):
    with pytest.raises(ContractError, match="a message"):
        wire.unpack_parts(RecordDict({wire.SECURE: ConfigRecord({key: b""})}))


def test_an_event_says_its_bands_where_it_has_any():
    banded = replace(EVENT, bands=8)
    for event in (EVENT, banded):
        content = wire.pack_update(Update(adapter={}, weight=1.0, clients=()), event)
        assert wire.unpack_event(content) == event
    with pytest.raises(ContractError, match="privacy event"):
        wire.read_event("no mapping")


@pytest.mark.parametrize("field", ["noise_multiplier", "sample_rate", "steps", "clip_norm", "bands"])
@pytest.mark.parametrize("value", [True, "1", None, -1, float("nan"), 1e400])
def test_an_event_s_numbers_are_numbers_in_their_range(field, value):
    with pytest.raises(ContractError, match="privacy event"):
        wire.read_event({**EVENT.to_json(), field: value})


@pytest.mark.parametrize("more", [{}, {"bands": 4}, {"sharers": 6.5}])
def test_an_event_arrives_as_its_ledger_writes_it(more):
    event = Event(noise_multiplier=1.5, sample_rate=0.1, steps=3, clip_norm=0.5, **more)
    told = event.to_json()
    assert len(told) == 4 + len(more) and wire.read_event(told) == event
