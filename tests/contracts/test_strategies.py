"""What every strategy promises; the package is listed, so a new file is tested automatically.

A round is played as the loop plays it, with all its trips, on clients whose trained tensors are drawn at random.
"""

import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora import plugins, strategy, suitability
from fedlora.adapter import Slot, Update, weighted_mean
from fedlora.engine import Replies
from fedlora.engine.base import gathered
from fedlora.errors import SettingError
from fedlora.kinds.contract import initial
from fedlora.rounds import checkpoint
from fedlora.scenario import parse
from fedlora.strategy import Merged

NAMES = plugins.names("strategies")
R, ALPHA = 4, 6.0  # alpha is not r: a scaling that is left out or applied twice shows
WEIGHTS = {"q": (8, 7), "v": (5, 9)}  # the shape of each layer


def layout_of(kind):
    slots = []
    for module, shape in WEIGHTS.items():
        for role, part in kind.parts.items():
            whole = kind.beside(role, *shape)
            slots.append(Slot(f"{module}.lora_{role}", whole, role, module, part.trains))
    return {s.name: s for s in [*slots, Slot("head", (3, 5), "head", "head")]}


def of_all(updates):
    """Updates summed into one, as workers do."""
    return gathered([Replies(updates, [])], True).updates


@dataclass
class Member:
    """A client that takes part: what it holds after training, and how it counts."""

    client: int
    weight: float
    rank: int
    seed: int


class World:
    """A strategy on a small layout, and rounds of it."""

    def __init__(self, name, kind=None, **options):
        import torch

        self.name, self.made = name, strategy.load(name, options)
        kind = kind or self.made.builds
        self.kind = plugins.find("kinds", kind)(R, ALPHA, ("q", "v"))
        self.layout = layout_of(self.kind)
        rng = np.random.default_rng(5)
        base = {m: torch.from_numpy(rng.normal(size=shape)) for m, shape in WEIGHTS.items()}
        self.initial = initial(self.kind, self.layout, 1, weights=base.__getitem__)
        self.made.bind(self.layout, self.kind, self.initial, False)
        self.adapter = {n: t + 0.1 if n in self.made.held else t for n, t in self.initial.items()}

    @property
    def before(self):
        return {n: self.adapter[n] for n in self.made.held}

    def members(self, count=4, seed=0, ranks=(R,)):
        rng = np.random.default_rng(seed)
        weights = rng.integers(1, 9, count)
        return [Member(k, float(weights[k]), ranks[k % len(ranks)], 100 * seed + k) for k in range(count)]

    def trained(self, told, member):
        """All that a member holds: what trains has moved, the rest is as received or as the seed made it."""
        told, rng = told.at(member.rank), np.random.default_rng(member.seed)
        held = {}
        for name, slot in self.layout.items():
            shape = self.kind.shape(slot, member.rank)
            whole = self.initial[name][tuple(slice(n) for n in shape)].copy()
            part = told.adapter.get(name, whole)
            whole[tuple(slice(n) for n in part.shape)] = part
            held[name] = whole + rng.normal(size=shape).astype(np.float32) * (name in told.train)
        return held

    def told(self, members, round=1):
        return self.made.instruct(round, self.adapter, sorted({m.rank for m in members}))

    def answers(self, told, members):
        return [
            Update(
                adapter=self.made.reply(told.at(m.rank), self.trained(self.first, m)),
                weight=m.weight,
                clients=(m.client,),
                scaling=self.kind.scaling(m.rank),
            )
            for m in members
        ]

    def play(self, members, round=1, change=lambda updates: updates):
        """The aggregate of a round as `Merged`, with the updates that it was made of."""
        told = self.first = self.told(members, round)
        for trip in range(1, self.made.trips + 1):
            updates = change(self.answers(told, members))
            if trip < self.made.trips:
                told = replace(told, adapter=self.made.relay(trip + 1, updates), ranked={}, trip=trip + 1)
        made = self.made.aggregate(self.before, updates)
        self.updates = updates
        return made if isinstance(made, Merged) else Merged(made, {})

    def meaning(self, done):
        """The change of each layer that the server's adapter and the merge stand for, and the head."""
        after = {**self.initial, **self.adapter, **done.adapter}
        change = self.kind.change(self.layout, after)
        dense = {m: self.kind.scaling() * b.astype(np.float64) @ a for m, (b, a) in change.items()}
        for module, (left, right) in done.base.items():
            dense[module] = dense[module] + left @ right
        return dense | {"head": after["head"]}

    def ideal(self, members):
        """`sum_k p_k s_k B_k A_k` of each layer, by dense products, and the mean head."""
        told, total = self.told(members), sum(m.weight for m in members)
        dense = {m: np.zeros(shape) for m, shape in WEIGHTS.items()} | {"head": np.zeros((3, 5))}
        for member in members:
            held = self.trained(told, member)
            scaled = member.weight / total * self.kind.scaling(member.rank)
            for module, (b, a) in self.kind.change(self.layout, held).items():
                dense[module] += scaled * b.astype(np.float64) @ a
            dense["head"] += member.weight / total * held["head"]
        return dense


def distance(one, other, keys=tuple(WEIGHTS)):
    """How far apart two meanings are, relative to the second."""
    wrong = sum(np.linalg.norm(one[k] - other[k]) ** 2 for k in keys)
    return float(np.sqrt(wrong / sum(np.linalg.norm(other[k]) ** 2 for k in keys)))


EXACT = [n for n in NAMES if plugins.find("strategies", n).facts.exact]
INEXACT = [n for n in NAMES if n not in EXACT and not plugins.find("strategies", n).personal]
UNEQUAL = [n for n in NAMES if plugins.find("strategies", n).unequal_ranks]


@pytest.fixture(params=NAMES)
def world(request):
    return World(request.param)


def test_instructs_about_tensors_that_exist_and_sends_what_it_holds(world):
    for round in (1, 2, 3):
        told = world.made.instruct(round, world.adapter)
        assert told.round == round and told.train
        assert set(told.adapter) == set(world.made.held) <= set(world.layout)
        assert set(told.send) <= set(told.train) and set(told.keep) <= set(told.train)
        assert not set(told.keep) & set(told.send)
        assert all(world.layout[n].trainable for n in (*told.train, *told.adapter))


def test_gives_new_values_of_the_same_keys_shapes_and_dtypes(world):
    done = world.play(world.members())
    assert set(done.adapter) <= set(world.before) and (done.adapter or done.base or not world.before)
    assert all(t.shape == world.before[n].shape and t.dtype == np.float32 for n, t in done.adapter.items())
    for module, (left, right) in done.base.items():
        assert (left.shape[0], right.shape[1]) == WEIGHTS[module]


def test_does_not_depend_on_the_order_in_which_replies_came(world):
    members = world.members()
    one = world.meaning(world.play(members))
    other = world.meaning(world.play(members, change=lambda updates: updates[::-1]))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_identical_updates_are_their_own_aggregate(world):
    world = World(world.name, **({"tau": 1.0} if world.name == "florist" else {}))  # which else drops a part
    same = [Member(k, w, R, 7) for k, w in enumerate((1.0, 5.0, 2.0))]
    after = world.meaning(world.play(same))
    if world.made.personal:  # only what travels can agree
        shared = world.trained(world.first, same[0])
        done = world.play(same).adapter
        assert all(np.allclose(done[n], shared[n], rtol=1e-5) for n in done)
        return
    for name, tensor in world.ideal(same).items():
        np.testing.assert_allclose(after[name], tensor, rtol=1e-4, atol=1e-5)


def test_leaves_its_input_alone(world):
    members, held = world.members(), {n: t.copy() for n, t in world.before.items()}
    copies = []

    def keep(updates):
        copies.append(([{n: t.copy() for n, t in u.adapter.items()} for u in updates], updates))
        return updates

    world.play(members, change=keep)
    for before, updates in copies:
        assert all(np.array_equal(c[n], u.adapter[n]) for c, u in zip(before, updates, strict=True) for n in c)
    assert all(np.array_equal(held[n], world.before[n]) for n in held)


@pytest.mark.parametrize("name", EXACT)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 6), data=st.data())
def test_exact_means_the_average_of_the_full_changes(name, seed, count, data):
    world = World(name)
    ranks = data.draw(st.lists(st.integers(1, R), min_size=1, max_size=3)) if name in UNEQUAL else (R,)
    members = world.members(count, seed, ranks)
    for round in (1, 2):  # those that take turns have two kinds of rounds
        done = world.play(members, round)
        ideal = ideal_at(world, members, round)
        assert distance(world.meaning(done), ideal) < 1e-5
        np.testing.assert_allclose(world.meaning(done)["head"], ideal["head"], rtol=1e-4, atol=1e-5)


def ideal_at(world, members, round):
    told = world.told
    world.told = lambda who: told(who, round)
    try:
        return world.ideal(members)
    finally:
        world.told = told


@pytest.mark.parametrize("name", [n for n in EXACT if n not in ("flora",)])
def test_an_exact_aggregate_logs_no_error(name):
    world = World(name, measure_error=True)
    done = world.play(world.members(5, 3))
    logged = world.made.diagnose(world.before, world.updates, {**world.before, **done.adapter}, done.base)
    assert logged["aggregation_error"] < 1e-6


@pytest.mark.parametrize("name", INEXACT)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 6), data=st.data())
def test_the_logged_error_equals_a_dense_computation(name, seed, count, data):
    world = World(name)
    ranks = data.draw(st.lists(st.integers(1, R), min_size=1, max_size=3)) if name in UNEQUAL else (R,)
    members = world.members(count, seed, ranks)
    ideal = world.ideal(members)
    done = world.play(members)
    logged = world.made.diagnose(world.before, world.updates, {**world.before, **done.adapter}, done.base)
    if world.made.trips == 1:
        dense = distance(world.meaning(done), ideal)
        assert logged["aggregation_error"] == pytest.approx(dense, rel=1e-5, abs=1e-6)
    else:
        assert logged == {}  # the server never has the factors


def test_clients_that_fail_leave_weights_that_sum_to_one(world):
    members = world.members(5)
    there = [m for m in members if m.client not in (0, 3)]
    done = world.meaning(world.play(there))
    if world.name in EXACT:
        assert distance(done, world.ideal(there)) < 1e-5
    if world.name != "hetlora":  # which weighs by the size of the change, the head too
        if not world.made.personal:
            np.testing.assert_allclose(done["head"], world.ideal(there)["head"], rtol=1e-4, atol=1e-5)
        heavier = [replace(m, weight=3 * m.weight) for m in there]
        for key, tensor in world.meaning(world.play(heavier)).items():
            np.testing.assert_allclose(tensor, done[key], rtol=1e-4, atol=1e-5)


def test_linear_means_the_weighted_mean(world):
    if not world.made.linear:
        return
    members = world.members(5)
    for there in (members, members[1:], members[:1]):
        done = world.play(there)
        expected = weighted_mean(world.updates)
        assert done.adapter.keys() == expected.keys() and not done.base
        for name in expected:
            np.testing.assert_allclose(done.adapter[name], expected[name], rtol=1e-6)


def test_what_may_be_summed_on_the_way_gives_the_same(world):
    if not (world.made.partial_sums or world.made.linear):
        return
    members = world.members(6)
    whole = world.meaning(world.play(members))
    summed = world.meaning(world.play(members, change=lambda u: [*of_all(u[:3]), *of_all(u[3:])]))  # two regions
    for name, tensor in whole.items():
        np.testing.assert_allclose(summed[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", UNEQUAL)
def test_clients_of_a_lower_rank_receive_and_send_what_their_rank_holds(name):
    world = World(name)
    members = world.members(4, 1, (1, R, 2))
    done = world.play(members)
    for member, update in zip(members, world.updates, strict=True):
        for tensor in (n for n in update.adapter if n in world.layout):
            assert update.adapter[tensor].shape == world.kind.shape(world.layout[tensor], member.rank)
    world.adapter = {**world.adapter, **done.adapter}
    told = world.told(members, 2)
    for rank in (1, 2, R):
        for tensor, value in told.at(rank).adapter.items():
            most = world.kind.shape(world.layout[tensor], rank)
            assert all(has <= size for has, size in zip(value.shape, most, strict=True))


@pytest.mark.parametrize("name", UNEQUAL)
def test_a_client_of_a_lower_rank_starts_from_the_first_directions_of_the_change(name):
    """What a client of rank 2 stands for is what the server's first two directions do, scaling included."""
    world = World(name)
    done = world.play(world.members(4, 1, (1, R, 2)))
    world.adapter = {**world.adapter, **done.adapter}
    small, whole = world.told([Member(0, 1.0, 2, 0)], 2).at(2).adapter, world.adapter
    for module in WEIGHTS:
        a, b = f"{module}.lora_A", f"{module}.lora_B"
        if a in small:
            keep = small[a].shape[0]
            meant = world.kind.scaling() * whole[b][:, :keep] @ whole[a][:keep]
            np.testing.assert_allclose(world.kind.scaling(2) * small[b] @ small[a], meant, rtol=1e-4, atol=1e-6)


def test_unequal_ranks_are_refused_where_they_mean_nothing(world):
    text = f"""
name: x
model: {{adapter: {{r: 8}}}}
data: {{dataset: tweets, client_test_share: 0.2}}
clients: {{total: 4, ranks: {{kind: list, values: [4, 8]}}}}
strategy: {{use: {world.name}}}
rounds: 1
"""
    asked = parse(text)
    if world.made.unequal_ranks:
        suitability.check(world.made, asked)
        return
    with pytest.raises(SettingError) as raised:
        suitability.check(world.made, asked)
    assert "equal ranks" in str(raised.value) and "flexlora" in str(raised.value)


@pytest.mark.parametrize("scale", [0.0, 1e10, 1e30])
def test_stays_finite(world, scale):
    def scaled(updates):
        return [
            replace(u, adapter={n: np.float32(scale) * t.clip(-10, 10) for n, t in u.adapter.items()})
            for u in updates
        ]

    done = world.play(world.members(), change=scaled)
    assert all(np.isfinite(t).all() for t in done.adapter.values())
    assert all(np.isfinite(side).all() for pair in done.base.values() for side in pair)


def test_survives_factors_of_a_lower_rank(world):
    """A column of B and a row of A that are zero, or two clients that are the same, break no decomposition."""

    def thin(updates):
        cut = []
        for update in updates:
            tensors = {n: t.copy() for n, t in update.adapter.items()}
            for name, tensor in tensors.items():
                if name.endswith("lora_B"):
                    tensor[:, 1:] = 0
            cut.append(replace(update, adapter=tensors))
        return cut

    done = world.play(world.members(), change=thin)
    after = {**world.before, **done.adapter}
    assert all(np.isfinite(t).all() for t in after.values())
    for module in WEIGHTS:  # a direction in which both factors are zero would never learn again
        a, b = after.get(f"{module}.lora_A"), after.get(f"{module}.lora_B")
        if a is not None and b is not None:
            assert ((np.abs(a).sum(1) > 0) | (np.abs(b).sum(0) > 0)).all()


def test_its_state_outlives_a_restart(world, tmp_path):
    members = world.members()
    done = world.play(members)
    adapter = {**world.adapter, **done.adapter}
    saved = checkpoint.Checkpoint(round=1, adapter=adapter, strategy=world.made.state(), words={})
    checkpoint.save(tmp_path / "checkpoint", saved)
    again = World(world.name)
    again.made.load_state(checkpoint.load(tmp_path / "checkpoint").strategy)
    again.adapter = world.adapter = adapter
    one, other = (w.play(w.members(4, 1), 2) for w in (world, again))
    assert all(np.array_equal(one.adapter[n], other.adapter[n]) for n in one.adapter)
    assert all(np.array_equal(x, y) for m in one.base for x, y in zip(one.base[m], other.base[m], strict=True))


def test_every_kind_that_it_takes_works(world, monkeypatch):
    """On layers whose modes are large enough for a tensor network of this rank."""
    monkeypatch.setattr(sys.modules[__name__], "WEIGHTS", {"q": (16, 20), "v": (20, 16)})
    taken = [kind for kind in plugins.names("kinds") if not suitability.refuses(world.made, kind)]
    refused = ["householder"] if world.made.linear and world.made.facts.exact else []
    every = [kind for kind in plugins.names("kinds") if kind not in refused]
    assert world.made.builds in taken and (world.made.moves or taken == every)
    for kind in taken:
        other = World(world.name, kind)
        done = other.play(other.members())
        assert all(np.isfinite(t).all() for t in done.adapter.values())
        if other.made.facts.exact:
            assert distance(other.meaning(done), other.ideal(other.members())) < 1e-5


def test_a_docstring_of_its_file_cites_a_source(world):
    module = sys.modules[type(world.made).__module__]
    assert "https://arxiv.org/abs/" in (module.__doc__ or "") and plugins.summary(
        "strategies", type(world.made).__module__.rsplit(".", 1)[1]
    )


def refusal(**changes):
    text = """
name: x
data: {dataset: tweets}
clients: {total: 4}
strategy: {use: ffa_lora}
rounds: 1
"""
    asked = parse(text, "x.yaml", [f"{key}={value}" for key, value in changes.items()])
    with pytest.raises(SettingError) as raised:
        suitability.check(strategy.load(asked.strategy.use, {}), asked)
    return f"{raised.value.key}: {raised.value.message}"


def test_what_a_strategy_cannot_do_is_refused_with_the_reason_and_with_those_that_can():
    ranks = {"clients.ranks": "{kind: list, values: [4, 8]}"}
    said = refusal(**{"strategy.use": "fedavg_lora"}, **ranks)
    assert said.startswith("clients.ranks: fedavg_lora needs equal ranks") and "flexlora, flora, florist" in said
    said = refusal(**{"strategy.use": "fedsa_lora"})
    assert said.startswith("strategy.use: fedsa_lora gives each client a model of its own")
    said = refusal(**{"strategy.use": "fed_sb", "model.adapter.kind": "lora"})
    assert (
        "fed_sb moves core, and lora has no core that can train: leave model.adapter.kind out" in said
        and "ffa_lora" in said
    )
    said = refusal(**{"strategy.use": "fed_sb", "model.adapter.r": 512})
    assert said.startswith("model.adapter.r: a weight of minilm is 384 x 384") and "r of at most 384" in said
    flower = {"strategy.use": "flwr.serverapp.strategy:FedAvg", "model.adapter.kind": "core"}
    assert refusal(**flower) == "strategy.parts: names nothing that trains of core: write [core, head]"
    said = refusal(**{"strategy.use": "flexlora", "model.adapter.kind": "lora_xs"})
    assert "flexlora moves A and B, and lora_xs has no A or B that can train" in said and "fed_sb" in said
