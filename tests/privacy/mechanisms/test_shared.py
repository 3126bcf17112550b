"""Noise that clients share out for their examples: what the sum carries, and what it costs from whom."""

import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from fedlora.adapter import Instruction, Update
from fedlora.client import Setter
from fedlora.clients.dp_sgd import DPSGD
from fedlora.engine import secure
from fedlora.engine.secure import mean, to_vector
from fedlora.errors import ContractError, UserError
from fedlora.privacy import ledger
from fedlora.privacy.accounting import Event, epsilon, in_sums
from fedlora.privacy.collector import Sum
from fedlora.privacy.graph import sharers
from fedlora.privacy.mechanisms import shared
from fedlora.privacy.mechanisms.shared import Shared
from fedlora.rounds.loop import Loop
from fedlora.scenario import parse
from fedlora.seeding import stream
from fedlora.simulation import simulate

MASKS = "secure_aggregation={range: 1.0, survivors: 0.66, noise: shared, honest: 0.75}"
ONE = "clients.local_steps=1"
SIZE = 20_000


def part(sigma=2.0, members=10, survivors=1.0, honest=1.0, range=1.0):
    many = sharers(members, survivors, honest)
    return Shared(
        noise_multiplier=sigma / math.sqrt(many),
        sharers=many,
        sample_rate=0.1,
        total=80,
        batch_size=8,
        steps=1,
        clip_norm=0.5,
        range=range,
    )


def stepped(mechanism, client, summed=0.0, lr=0.4):
    """The tensor of a client after a step from zeros, with that in each coordinate of its clipped sum."""
    parameter = torch.nn.Parameter(torch.zeros(SIZE))
    optimizer = mechanism.optimizer(torch.optim.SGD([parameter], lr=lr), stream(client, "noise"))
    parameter.grad_sample = torch.zeros(1, SIZE)
    optimizer.clip_and_accumulate()
    parameter.summed_grad += summed
    optimizer.add_noise()
    optimizer.scale_grad()
    optimizer.original_optimizer.step()
    return parameter.detach().numpy()


@pytest.mark.parametrize(
    ("members", "survivors", "honest", "many"),
    [
        (10, 1.0, 1.0, 9.0),  # whoever looks may be one of the ten
        (10, 0.66, 1.0, 6.0),  # seven send at the least
        (10, 1.0, 0.7, 7.0),  # the server and three of ten
        (10, 0.66, 0.5, 3.5),
        (3, 0.66, 1.0, 2.0),
        (3, 0.66, 0.1, 1.0),  # its own noise a client keeps
        (100, 0.8, 1.0, 81.0),  # 27 of each 33 on the ring: 82 of the 100
    ],
)
def test_noise_is_divided_among_the_fewest_honest_senders(members, survivors, honest, many):
    assert sharers(members, survivors, honest) == pytest.approx(many)


def test_the_noise_on_a_sum_of_ten_is_the_stated_one_to_two_percent():
    """sigma 2, C 0.5, lr 0.4, batches of 8: 0.05 in the sum of nine parts, and sqrt(10 / 9) of that in ten."""
    mechanism, held = part(), np.zeros(SIZE, np.float32)
    told = Instruction(round=1, adapter={"w": held}, train=("w",), send=("w",), config={shared.MEMBERS: 10})
    total = np.zeros(SIZE, np.uint32)
    for client in range(10):
        update = Update(adapter={"w": stepped(mechanism, client)}, weight=1.0, clients=(client,))
        rounding = stream(client, "rounding")
        total = total + to_vector(told, update, 10, 10, 1.0, lambda _, rounding=rounding: rounding)
    made = mean(told, Sum(total, tuple(range(10)), tuple(range(10))), 1.0)
    assert np.std(made.adapter["w"] * 10) == pytest.approx(0.05 * (10 / 9) ** 0.5, rel=0.02)
    with pytest.raises(ContractError, match="another number of clients"):
        to_vector(told, update, 9, 10, 1.0, lambda _: stream(1, "rounding"))


def test_a_sum_is_cut_to_what_fits_before_noise_is_added_and_none_fails():
    """0.4 / 8 of a sum of 1,000 would be 50, and the range is 1; so is that of one of 10,000."""
    mechanism = part()
    std = shared.deviation(2.0, 0.5, 0.4, 8, 9.0)
    for summed in (1e3, 1e4):
        found = stepped(mechanism, 0, summed)
        assert np.abs(found).max() < 1.0 and np.mean(found) == pytest.approx(-(1 - 10 * std), abs=5e-4)
    np.testing.assert_array_equal(stepped(mechanism, 0, 1e3), stepped(mechanism, 0, 1e4))
    with pytest.raises(ContractError, match="too much for a range"):
        stepped(part(range=0.1), 0)
    with pytest.raises(ContractError, match="too little for the grid"):
        stepped(part(range=1e4), 0)


def test_a_coalition_of_the_server_and_three_of_ten_sites_is_accounted_for():
    """sigma 1 at sampling rate 0.1 over 20 rounds, seven honest of ten; and one alone, by dp-accounting."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    spent = [part(sigma=1.0, honest=0.7).event()] * 20
    assert spent[0].sharers == pytest.approx(7) and spent[0].noise_multiplier == pytest.approx(7**-0.5)
    for events, noise in ((in_sums(spent), 1.0), (spent, 7**-0.5), (in_sums(spent, 0.5), 0.5**0.5)):
        by_hand = PLDAccountant()
        by_hand.compose(PoissonSampledDpEvent(0.1, GaussianDpEvent(noise)), 20)
        assert epsilon(events, 1e-5) == pytest.approx(by_hand.get_epsilon(1e-5), rel=0.01)


def test_an_event_without_others_is_what_it_was():
    event = Event(noise_multiplier=1.0, sample_rate=0.1, steps=1, clip_norm=1.0)
    assert in_sums([event]) == (event,) and "sharers" not in event.to_json()
    one = replace(event, sharers=4.0)
    assert Event.from_json(one.to_json()) == one and in_sums([one])[0].noise_multiplier == 2.0
    for wrong in (0.5, float("nan"), 1e9):
        with pytest.raises(UserError):
            replace(event, sharers=wrong)


def test_a_client_never_adds_less_than_it_needs_and_believes_no_more_members_than_there_may_be(tiny):
    scenario = tiny(MASKS, ONE)
    setter = Setter(scenario, {48: 1.5})
    asked = Instruction(round=1, adapter={}, train=(), send=())

    def told(**words):
        return setter(replace(asked, config=words), 48)

    assert (told().noise_multiplier, told().sharers) == (1.5, 2.0)  # three of four send, one may look
    assert told(**{shared.EXAMPLE_NOISE: 2.5}).noise_multiplier == 2.5
    for words, said in (
        ({shared.EXAMPLE_NOISE: 1.4}, "less noise than the 1.5"),
        ({shared.EXAMPLE_NOISE: float("nan")}, "less noise"),
        ({shared.MEMBERS: 5}, "not 3 to 4"),
        ({shared.MEMBERS: 2}, "not 3 to 4"),
    ):
        with pytest.raises(ContractError, match=said):
            told(**words)


def test_a_run_has_two_epsilons_and_its_ledger_alone_gives_both(tiny, tmp_path, capsys):
    from fedlora.cli import main
    from fedlora.planning import plan

    run = simulate(tiny(MASKS, ONE), out=tmp_path / "run")
    file, told = run.folder / "privacy.jsonl", run.summary
    spent = ledger.replay(file)
    assert set(spent) == {0, 1, 2, 3} and {e.sharers for events in spent.values() for e in events} == {2.0}
    assert ledger.epsilon_of(file, in_sum=True) == told["epsilon"] == told["server_epsilon"] <= 8
    assert ledger.epsilon_of(file) == told["own_epsilon"] > told["epsilon"]
    assert "of those who sent 75% keep" in told["privacy"] and "own part of the noise alone" in told["privacy"]
    made = plan(tiny(MASKS, ONE), advise=True)
    assert made.signal["parts"] == 2 and made.advice
    for key in ("epsilon", "server_epsilon", "own_epsilon"):
        assert getattr(made, key) == pytest.approx(told[key], rel=1e-6)
    assert main(["ledger", str(run.folder)]) == 0
    said = capsys.readouterr().out
    assert said.count("from all who see sums") == said.count("own part of the noise alone") == 3
    alone = simulate(tiny("secure_aggregation={range: 1.0}", ONE), out=tmp_path / "alone")
    assert alone.summary["epsilon"] == pytest.approx(told["epsilon"], rel=0.01)
    assert alone.summary["own_epsilon"] is None


@pytest.mark.parametrize(
    ("privacy", "draws"),
    [
        ("{epsilon: 8, delta: 1.0e-2, reserve: 1}", [0, 1]),
        ("{epsilon: 8, delta: 1.0e-2}", [0]),  # none is left for another sum
    ],
)
def test_a_round_that_runs_again_with_others_draws_again_and_pays(tiny, tmp_path, monkeypatch, privacy, draws):
    """Client 2 fails, the sum of three is opened and paid for; then all four are there."""
    scenario, parts = tiny(MASKS, ONE, "rounds=1", f"privacy={privacy}"), {}

    def seen(instruction, update, *told):
        change = np.concatenate([(update.adapter[n] - instruction.adapter[n]).ravel() for n in instruction.send])
        parts.setdefault(update.clients[0], []).append(change)
        return to_vector(instruction, update, *told)

    def fails(self, task, adapter, partition, *told):
        if partition.client == 2:
            raise MemoryError
        return (yield from passes(self, task, adapter, partition, *told))

    def dies(*_):
        raise KeyboardInterrupt

    passes = DPSGD.passes
    monkeypatch.setattr(secure, "to_vector", seen)
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(DPSGD, "passes", fails)
        patch.setattr(Loop, "_record", dies)
        simulate(scenario, out=tmp_path / "run")
    simulate(scenario, out=tmp_path / "run", resume=True)
    lines = ledger.read(tmp_path / "run" / "privacy.jsonl")
    assert all([line["draw"] for line in lines if line["client"] == c] == draws for c in range(4))
    assert {client: len(made) for client, made in parts.items()} == (
        {0: 2, 1: 2, 2: 1, 3: 2} if draws == [0, 1] else {0: 1, 1: 1, 3: 1}
    )
    assert not any(np.array_equal(*made) for made in parts.values() if len(made) == 2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "a second step depends on the first: write 1"),
        ([ONE, "privacy.clip=quantile"], "the bound of a sum is one and fixed"),
        ([ONE, "privacy.bands=2"], "noise takes back what the same senders added"),
        ([ONE, "clients.optimizer=adamw"], "a sum takes plain steps"),
        ([ONE, "clients.retries=1"], "two sums of a round would carry one noise"),
        ([ONE, "clients.use=tests.engine.faulty:Flaky"], "dp_sgd alone divides its noise"),
        ([ONE, "privacy=null", "clients.use=sgd"], "no noise to share"),
    ],
)
def test_what_a_sum_of_parts_does_not_protect_is_refused(tiny_yaml, settings, said):
    with pytest.raises(UserError, match=said) as error:
        parse(tiny_yaml, "tiny.yaml", [MASKS, *settings])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["strategy.use=fedsa_lora", "data.client_test_share=0.2"], "keeps tensors with clients"),
        (["strategy.use=la_lora"], "does more with a step than send it"),
        (["strategy.use=fedask"], "secure aggregation gives sums"),
        (["secure_aggregation.range=1.0e-3"], "too much for a range of 0.001"),
    ],
)
def test_strategies_and_ranges_that_do_not_go_with_it_are_refused(tiny, tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        simulate(tiny(MASKS, ONE, *settings), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_persons_and_shared_passes_go_with_it(tiny, tmp_path):
    for settings, unit in (
        (["privacy.person=text"], "person"),
        (["engine.fused=2"], "example"),
    ):
        run = simulate(tiny(MASKS, ONE, "rounds=1", *settings), out=tmp_path / unit)
        (line, *_) = [yaml.safe_load(text) for text in (run.folder / "privacy.jsonl").read_text().splitlines()]
        assert (line["unit"], line["honest"], line["sharers"]) == (unit, 0.75, 2.0)
        assert run.summary["own_epsilon"] > run.summary["epsilon"]
