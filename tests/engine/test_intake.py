"""What may be aggregated: what a hostile client could send is refused by name, and costs nobody else."""

from dataclasses import replace

import numpy as np
import pytest

from fedlora.adapter import Instruction, Slot, Update
from fedlora.engine.intake import ENORMOUS, Intake
from fedlora.engine.replies import Replies, Report
from fedlora.errors import ContractError
from fedlora.kinds.lora import Lora
from fedlora.privacy.accounting import Event
from fedlora.strategies.ffa_lora import FFALoRA

LAYOUT = {n: Slot(n, shape, n[0], "m") for n, shape in (("A.w", (4, 5)), ("B.w", (3, 4)), ("head.w", (2,)))}
RECEIVED = {"B.w": np.full((3, 4), 0.5, np.float32), "head.w": np.ones(2, np.float32)}
ASKED = Instruction(round=5, adapter=RECEIVED, train=("B.w", "head.w"), send=("B.w", "head.w"))
EVENT = Event(noise_multiplier=1.0, sample_rate=0.1, steps=2, clip_norm=1.0)


@pytest.fixture
def intake(tiny):
    """Makes an intake where client c holds 10 + c examples."""

    def make(*overrides, held=lambda client: 10 + client):
        strategy = FFALoRA()
        strategy.bind(
            LAYOUT, Lora(4, 8.0, ("m",)), {n: np.zeros(s.shape, np.float32) for n, s in LAYOUT.items()}, True
        )
        return Intake(tiny(*overrides), strategy, held)

    return make


def update(client=0, **changes):
    return replace(
        Update(adapter={n: t.copy() for n, t in RECEIVED.items()}, weight=1.0, clients=(client,)), **changes
    )


def report(client, **more):
    return Report(
        client=client, num_examples=9, steps=2, bytes_up=7, bytes_down=8, seconds=0.1, event=EVENT, **more
    )


def with_head(value, dtype=np.float32):
    return {**RECEIVED, "head.w": np.array([1.0, value], dtype)}


def test_an_honest_update_passes_as_it_is(intake):
    honest = update(3, weight=13.0, metrics={"train_loss": 0.5})
    assert intake("clients.max_norm=0.1").check(honest, ASKED) is honest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": {"B.w": RECEIVED["B.w"]}}, "differs in head.w"),
        ({"adapter": {**RECEIVED, "A.w": np.zeros((4, 5), np.float32)}}, "differs in A.w"),
        ({"adapter": {**RECEIVED, "B.w": np.zeros((4, 3), np.float32)}}, r"B.w has shape \(4, 3\), not \(3, 4\)"),
        ({"adapter": with_head(1, np.int64)}, "holds int64, not float32"),
        ({"adapter": with_head(1.0, np.float64)}, "holds float64, not float32"),
        ({"adapter": with_head(None, object)}, "holds object, not float32"),
        ({"adapter": {**RECEIVED, "head.w": [1.0, 1.0]}}, "holds <class 'list'>|holds list, not float32"),
        ({"adapter": with_head(np.nan)}, "not finite"),
        ({"adapter": with_head(-np.inf)}, "not finite"),
        ({"adapter": with_head(3e38)}, r"norm 3e\+38, above 1e\+12"),
        ({"adapter": with_head(4.0)}, r"moved by 3, further than clients.max_norm, 2.5"),
        ({"moments": np.zeros((2, 2), np.float32)}, "second moments are 0 rows"),
        ({"weight": 10.5}, "claims to weigh 10.5, and its examples are 10 at most"),
        ({"weight": 1e9}, "claims to weigh 1000000000, and its examples are 10"),
        ({"weight": np.nan}, "positive number, not nan"),
        ({"weight": np.inf}, "positive number, not inf"),
        ({"weight": -1.0}, "positive number, not -1"),
        ({"metrics": {str(i): 0.0 for i in range(33)}}, "more than 32 figures"),
        ({"metrics": {"x" * 33: 0.0}}, "more than 32 figures"),
    ],
)
def test_what_is_refused(intake, changes, words):
    with pytest.raises(ContractError, match=words):
        intake("clients.max_norm=2.5").check(update(**changes), ASKED)


def test_a_change_on_the_bound_passes_and_one_beyond_does_not(intake):
    """3 up in one number and 4 in another is a change of norm 5, over all tensors together."""
    moved = {"B.w": RECEIVED["B.w"].copy(), "head.w": RECEIVED["head.w"] + np.float32([3, 0])}
    moved["B.w"][2, 1] += 4
    assert intake("clients.max_norm=5").check(update(adapter=moved), ASKED)
    with pytest.raises(ContractError, match="moved by 5, further"):
        intake("clients.max_norm=4.999").check(update(adapter=moved), ASKED)
    assert intake().check(update(adapter=with_head(ENORMOUS / 2)), ASKED)


def test_claims_that_the_server_cannot_know_are_bounded_where_asked(intake):
    unknown = {"held": lambda client: 0}
    assert intake(**unknown).check(update(weight=1e9), ASKED)
    bounded = intake("clients.max_examples=500", **unknown)
    assert bounded.check(update(weight=500.0), ASKED)
    with pytest.raises(ContractError, match="its examples are 500 at most"):
        bounded.check(update(weight=501.0), ASKED)
    assert intake().check(update(weight=21.0, clients=(0, 1)), ASKED)  # 10 + 11 examples
    with pytest.raises(ContractError, match="its examples are 21 at most"):
        intake().check(update(weight=22.0, clients=(0, 1)), ASKED)


def test_figures_that_are_no_finite_numbers_are_left_out(intake):
    told = {"train_loss": np.nan, "fine": 1.0, "huge": np.inf}
    assert intake().check(update(metrics=told), ASKED).metrics == {"fine": 1.0}


def test_replies_that_do_not_belong_are_counted_and_named(intake):
    """Of six answers one is good: the others are doubled, unasked for, or of a client that failed."""
    updates = [update(0), update(1), update(1), update(2), update(9), update(3, weight=1e9)]
    reports = [report(0), report(1), report(2, error="x" * 900), report(3)]
    admitted = intake().admit(ASKED, [0, 1, 2, 3], Replies(updates, reports))
    assert [u.clients for u in admitted.updates] == [(0,)]
    errors = {r.client: r.error for r in admitted.reports}
    assert errors[0] is None and errors[1] == "ContractError: client 1 answered 2 times"
    assert errors[2] == "x" * 500 and errors[9] == "ContractError: client 9 was not asked"
    assert errors[3] == "ContractError: claims to weigh 1000000000, and its examples are 13 at most"
    assert [r.client for r in admitted.reports] == [0, 1, 2, 3, 9]
    spent = {r.client: (r.event, r.steps) for r in admitted.reports}
    assert spent == {0: (EVENT, 2), 1: (EVENT, 0), 2: (EVENT, 0), 3: (EVENT, 0), 9: (None, 0)}


def test_a_sum_that_holds_a_client_twice_is_refused_whole(intake):
    admitted = intake().admit(
        ASKED, [0, 1], Replies([update(0, clients=(0, 1)), update(1)], [report(0), report(1)])
    )
    assert not admitted.updates and all("client 1 answered 2 times" in r.error for r in admitted.reports)


def test_an_engine_that_loses_a_client_breaks_its_contract(intake):
    with pytest.raises(ContractError, match="what became of client 1"):
        intake().admit(ASKED, [0, 1], Replies([update(0)], [report(0)]))
