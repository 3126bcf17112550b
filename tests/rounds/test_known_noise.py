"""The noise in a round's mean: what is said of it, against what is there."""

import numpy as np
import pytest

from fedlora.errors import ScenarioError, SettingError
from fedlora.prepare import check
from fedlora.rounds.known_noise import KnownNoise
from fedlora.rounds.shrink import Shrinker
from fedlora.simulation import simulate

LOUD = ("privacy.epsilon=null", "privacy.noise_multiplier=100", "clients.lr=0.01", "strategy.shrink=true")
SKEW = "data.partition={kind: dirichlet, alpha: 0.5, min_examples: 20}"
WHOLE = "privacy={unit: client, noise_multiplier: 100, delta: 1.0e-2}"


@pytest.mark.parametrize(
    "told",
    [
        (),
        ("privacy.share_metrics=true", SKEW),
        ("clients.sample_rate=0.1", SKEW),
        (
            "clients.lr={A: 0.02, B: 0.01, head: 0.03}",
            "clients.schedule={kind: linear}",
            "strategy.use=fedavg_lora",
        ),
        ("privacy.clip=per_layer", "clients.per_round=3"),
        ("strategy.use=la_lora", "strategy.low_pass=false", "clients.local_steps=3"),
        ("strategy.use=rolora", "strategy.server={kind: momentum, momentum: 0, lr: 0.5}"),
        ("secure_aggregation={range: 100.0}",),
        (WHOLE, "clients.use=sgd", "clients.per_round=2"),
        (WHOLE, "clients.use=sgd", "clients.per_round=2", "privacy.bands=2"),
    ],
    ids="plain by-examples sample-rate by-role cohort turns rolora masked unit-client bands".split(),
)
def test_what_is_said_is_what_is_there(told, tiny, tmp_path, monkeypatch):
    """Noise so large that a mean change is noise alone: over what is said it has a deviation of one."""
    seen = {}

    def look(self, before, mean, noise):
        for name, tensor in mean.items():
            part = (tensor.astype(np.float64) - before[name]) / noise[name]
            seen.setdefault(self.layout[name].role, []).append(part.ravel())
        return dict(mean), None

    monkeypatch.setattr(Shrinker, "step", look)
    unit = tuple(t for t in LOUD if not t.startswith("privacy")) if WHOLE in told else LOUD
    simulate(tiny(*unit, *told, "rounds=3"), out=tmp_path / "run")
    for role, parts in seen.items():
        drawn = np.concatenate(parts)
        assert drawn.std() == pytest.approx(1.0, abs=5 / (2 * drawn.size) ** 0.5), (role, drawn.size)


def test_it_shrinks_in_a_run_and_costs_nothing(tiny, tmp_path):
    plain, made = (
        simulate(tiny(*told), out=tmp_path / str(len(told))) for told in ((), ("strategy.shrink=true",))
    )
    assert made.summary["epsilon"] == plain.summary["epsilon"]
    assert all(0 <= line["singular_values_left"] < 1 for line in made.rounds)
    assert "singular_values_left" not in plain.rounds[0]


def test_without_privacy_it_does_nothing_and_says_so(tiny, tmp_path):
    scenario = tiny("strategy.shrink=true", private=False)
    assert scenario.unused == [
        "strategy.shrink: does nothing without a privacy section: there is no noise to shrink"
    ]
    plain, made = (simulate(s, out=tmp_path / str(i)) for i, s in enumerate((tiny(private=False), scenario)))
    assert made.summary["loss"] == plain.summary["loss"] and made.rounds[0]["singular_values_left"] is None


@pytest.mark.parametrize(
    "told, said",
    [
        (("strategy.use=flexlora",), r"strategy.shrink: .*flexlora makes is no mean, .* take one of .*ffa_lora"),
        (("strategy.use=flora",), r"strategy.shrink: .*flora"),
        (("strategy.use='flwr.serverapp.strategy:FedAvg'",), r"strategy.shrink: .*FedAvg"),
        (("compression={up: {kind: int8}}",), r"strategy.shrink: compression.up changes what clients send"),
        (("world={concurrency: 3}",), r"strategy.shrink: world.concurrency"),
        (("privacy.bands=2",), r"privacy.bands: how much noise .* not known"),
        (("privacy.clip=quantile", "privacy.noise_multiplier=0.3", "privacy.epsilon=null"), r"privacy.clip: "),
        (("clients.optimizer=adamw",), r"clients.optimizer: "),
        (("clients.optimizer={kind: sgd, momentum: 0.9}",), r"clients.optimizer: "),
        (("strategy.use=la_lora",), r"strategy.low_pass: "),
        (("clients.use='tests.rounds.test_known_noise:Own'",), r"clients.use: .*Own does not say how much noise"),
    ],
)
def test_where_it_is_not_known_a_line_says_so(told, said, tiny):
    with pytest.raises(SettingError, match=said):
        check(tiny("strategy.shrink=true", *told))


def test_a_key_that_is_none_is_told(tiny):
    for told, said in (("{strenght: 1}", "strength"), ("{strength: 0}", "greater than 0"), ("maybe", "mapping")):
        with pytest.raises(ScenarioError, match=said):
            tiny(f"strategy.shrink={told}")
    assert tiny("strategy.shrink=false").strategy.shrink is None
    assert tiny("strategy.shrink=true").strategy.shrink.strength == 1.0


def test_of_nobody_that_noises_there_is_none(tiny):
    from fedlora.adapter import Instruction, Slot

    told = Instruction(round=1, adapter={}, train=("b",), send=("b",))
    made = KnownNoise(scenario=tiny(private=False), client=None, layout={"b": Slot("b", (1, 1), "B", "m")})
    assert made.of(told, [], []) == {"b": 0.0}


def _own():
    from fedlora.clients.dp_sgd import DPSGD

    class Own(DPSGD):
        """Steps by an optimiser of its own."""

        def optimizer(self, parameters, settings):
            return super().optimizer(parameters, settings)

    return Own


Own = _own()
