import tempfile

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora import wire
from fedlora.engine import turns
from fedlora.engine.turns import Reply, in_turn
from tests.deploy.federation import LocalGrid

COHORT = (2, 3, 5, 7, 11)


def reply(client):
    return Reply(wire.pack_words({"client": client}), float(client))


def said(answers, **options):
    """By turn, the client whose content it is; what failed in words; None of those who said nothing."""
    found = []
    for one in in_turn(COHORT, answers, **options):
        words = one and (one.error or wire.unpack_words(one.content)["client"])
        assert words is None or one.error or one.seconds == words
        found.append(words)
    return found


@settings(max_examples=40, deadline=None)
@given(st.permutations(COHORT), st.integers(0, 5))
def test_replies_are_in_the_order_of_clients_whatever_the_order_they_come_in(order, many):
    came = order[:many]
    assert said((client, reply(client)) for client in came) == [c if c in came else None for c in COHORT]


def test_of_two_answers_the_first_counts_wherever_the_second_comes():
    assert said([(2, reply(2)), (2, reply(7)), (5, reply(5)), (5, reply(3)), (3, reply(3))])[:3] == [2, 3, 5]


def test_an_answer_of_nothing_is_one_whenever_it_comes():
    nothing = Reply(RecordDict(), 1.0)
    for order in ((2, 3), (3, 2)):
        first, second, *_ = in_turn(COHORT, ((c, nothing if c == 3 else reply(c)) for c in order))
        assert first.content is not None and second.content is not None and not second.error


def test_a_reply_is_given_at_once_where_it_is_its_turn():
    taken = []

    def come():
        for client in (2, 5, 3, 7, 11):
            taken.append(client)
            yield client, reply(client)

    turn = in_turn(COHORT, come())
    seen = []
    for _ in COHORT:
        next(turn)
        seen.append(list(taken))
    assert [len(then) for then in seen] == [1, 3, 3, 4, 5]  # 5 waits for 3


def test_what_waits_is_on_disk_in_the_folder_and_in_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "SPOOL", 8)
    made = []
    spooled = tempfile.SpooledTemporaryFile
    monkeypatch.setattr(
        tempfile, "SpooledTemporaryFile", lambda *told, **more: made.append(spooled(*told, **more)) or made[0]
    )
    assert said(((client, reply(client)) for client in (11, 7, 5, 3, 2)), folder=tmp_path) == list(COHORT)
    assert made[0]._rolled and made[0].closed and not list(tmp_path.iterdir())


def test_one_that_failed_waits_with_its_words():
    LocalGrid({})  # messages need to know of a run
    asked = Message(wire.pack_words({}), 1, "train", ttl=60.0, group_id="")
    asked.metadata.__dict__["_message_id"] = "asked"
    failed = Reply.of(Message(Error(7, "gone"), reply_to=asked), 1.0)
    assert (failed.content, failed.error) == (None, "gone")
    answers = [(5, failed), (11, reply(11)), (2, reply(2))]
    assert said(answers) == [2, None, "gone", None, 11]


def test_arrays_come_back_as_they_were():
    content, sent = wire.pack_words({}), np.arange(6, dtype=np.float32).reshape(2, 3) / 7
    content[wire.ARRAYS] = wire.to_arrays({"a": sent})
    (_, late, *_) = in_turn(COHORT, [(3, Reply(content, 0.0)), (2, reply(2))])
    assert np.array_equal(wire.from_arrays(late.content.array_records[wire.ARRAYS])["a"], sent)


@pytest.mark.parametrize("client", [4, 13])
def test_who_was_not_asked_is_an_error(client):
    with pytest.raises(KeyError):
        list(in_turn(COHORT, [(client, reply(client))]))
