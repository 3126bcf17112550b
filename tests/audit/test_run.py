"""Whole audits on the tiny model: the true client stands, each seeded fault falls."""

import json

import pytest

from fedlora.audit import audit
from fedlora.cli import main
from fedlora.errors import UserError
from fedlora.privacy.accounting import calibrate

LONG = ("rounds=40", "clients.local_steps=1", "clients.batch_size=12", "clients.lr=0.05", "privacy.delta=1.0e-5")
FAULTY = "clients.use=tests.audit.faulty:"


@pytest.fixture
def run(tiny, tmp_path):
    return lambda *overrides: audit(tiny(*LONG, *overrides), out=tmp_path / "audit", canaries=500)


def test_the_true_client_keeps_its_claim_and_still_leaks_something(run, tmp_path):
    made = run("privacy.epsilon=2")
    assert not made.refuted and 1.9 < made.claimed <= 2
    assert 0.05 < made.server.epsilon < made.claimed  # the attack sees something: a bound of 0 would prove nothing
    assert made.model.epsilon < made.claimed
    names = {p.name for p in (tmp_path / "audit").iterdir()}
    assert {"audit.json", "audit.png", "scenario.yaml", "privacy.jsonl", "privacy.head"} <= names
    written = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert written["server"]["epsilon"] == made.server.epsilon and written["refuted"] is False
    assert (tmp_path / "audit" / "audit.png").read_bytes()[:4] == b"\x89PNG"


def test_a_share_of_the_examples_is_audited_as_a_batch_is(tiny, tmp_path):
    """Beside Adam at the server, as `fedlora init --data` writes it."""
    told = ("clients.sample_rate=0.25", "strategy.use=ffa_lora", "strategy.server={kind: adam, lr: 0.01}")
    long = ("rounds=20", "privacy.epsilon=2", "model.adapter.r=16", *told)
    made = audit(tiny(*LONG, *long), out=tmp_path / "true", canaries=300)
    assert not made.refuted and made.noise.lines()[0].startswith("as stated in each tensor"), made.lines()
    assert made.server.correct > 0.5 * made.server.guesses
    fault = audit(tiny(*LONG, *long, FAULTY + "TenthOfTheNoise"), out=tmp_path / "faulty", canaries=300)
    assert fault.refuted and not made.noise.refuted


@pytest.mark.parametrize("fault", ["NoNoise", "TenthOfTheNoise"])
def test_noise_that_is_not_there_refutes_the_claim(run, fault):
    made = run("privacy.epsilon=2", FAULTY + fault)
    assert made.refuted and made.server.epsilon > made.claimed > 1.9
    assert "REFUTED" in made.lines()[-1]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("SameNoise", "used again in 180 pairs of updates: client 0 in round 1 and client 0 in round 2"),
        ("NoiseTwice", "used again in 20 pairs of updates: client 0 in round 1 and client 0 in round 2"),
        ("LowBits", "used again in 60 pairs of updates: client 0 in round 1 and client 1 in round 1"),
        ("BareHead", "too little in base_model.model.classifier.bias, base_model.model.classifier.weight"),
    ],
)
def test_noise_that_is_not_what_is_stated_refutes_the_claim(tiny, tmp_path, fault, words):
    """On 2,114 numbers: with fewer an update that repeats is not told from gradients that agree."""
    short = ("privacy.epsilon=2", "rounds=10", "model.adapter.r=16")
    made = audit(tiny(*LONG, *short, FAULTY + fault), out=tmp_path / "audit", canaries=200)
    assert made.refuted and any(line.startswith(words) for line in made.noise.lines()), made.lines()
    assert made.lines()[-1] == "  the claim is REFUTED: its noise is not as stated"
    written = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert written["refuted"] is True and written["noise"]["repeats"] == made.noise.repeats


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("strategy.use=rolora",), "as stated"),  # A and B by turns, a round each
        (
            ("strategy.use=la_lora", "clients.local_steps=3"),
            "as stated",
        ),  # by turns, a step each, and both filtered
        (("strategy.use=fedavg_lora", "clients.local_steps=3", "clients.lr=1.0"), "as stated"),
        (("compression={up: {kind: int8}}",), "not measured: compression.up rounds"),
        (
            ("privacy.clip=quantile", "clients.local_steps=2", "clients.batch_size=40", "privacy.epsilon=30"),
            "not measured: the clipping bound moves",
        ),
    ],
)
def test_the_true_client_s_noise_is_not_accused(tiny, tmp_path, overrides, says):
    made = audit(tiny(*LONG, "rounds=4", "privacy.epsilon=2", *overrides), out=tmp_path / "audit", canaries=60)
    assert not made.refuted and made.noise.lines()[0].startswith(says), made.lines()


def test_banded_noise_is_taken_apart_before_it_is_measured(tiny, tmp_path):
    """Else its rounds would be accused of sharing noise, which they do by design."""
    made = audit(
        tiny(*LONG, "rounds=16", "privacy.epsilon=2", "privacy.bands=3", "model.adapter.r=16"),
        out=tmp_path / "audit",
        canaries=500,
    )
    assert not made.refuted and made.noise.updates == 64, made.lines()
    assert made.noise.lines()[0] == "as stated in each tensor of 64 updates, none of it used again"
    assert made.server.epsilon < made.claimed <= 2 and "banded noise, b = 3" in made.lines()[1]
    assert made.server.correct > 0.5 * made.server.guesses


@pytest.mark.parametrize(("fault", "bands"), [("OwnNoise", 3), ("OtherBands", 3)])
def test_noise_of_other_bands_than_are_stated_refutes_the_claim(tiny, tmp_path, fault, bands):
    """Independent noise, and that of twice as many bands; as much of it as is stated, each by itself."""
    told = ("rounds=10", "privacy.epsilon=2", f"privacy.bands={bands}", "model.adapter.r=16", FAULTY + fault)
    made = audit(tiny(*LONG, *told), out=tmp_path / "audit", canaries=200)
    assert made.refuted and made.noise.repeats > 0 and not made.noise.short, made.lines()


def test_a_fresh_accountant_each_round_refutes_its_claim(run, tiny):
    one_round = calibrate(1.0, 1e-5, 12 / 45, 1)  # of the largest client
    made = run(f"privacy={{noise_multiplier: {one_round}, delta: 1.0e-5}}", FAULTY + "FreshAccountant")
    assert made.refuted and 0.9 < made.claimed < 1.2


def test_the_command_prints_both_figures_and_says_by_its_code_whether_the_claim_stands(
    tiny_yaml, tmp_path, capsys
):
    file = tmp_path / "tiny.yaml"
    file.write_text(tiny_yaml)
    command = ["audit", str(file), "--out", str(tmp_path / "a"), "--canaries", "400", "--set"]
    assert main([*command, "rounds=1"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[1].startswith("  claimed       epsilon ") and "for each example" in told[1]
    assert "with 95% confidence" in told[2] and told[-1] == "  the claim is not refuted"
    assert told[4].startswith("  noise         as stated in each tensor of 4 updates")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("privacy=null", "no privacy section"),
        ("privacy={unit: client, epsilon: 1, delta: 0.01}", "no privacy section of unit: example"),
        ("clients.use=tests.engine.faulty:Nothing", "has no class 'Nothing'"),
        ("rounds=2", "is there already"),
        ("strategy.use=fedask", "clients of fedask send no plain update"),
        ("strategy={use: florist, tau: 0.3}", "clients of florist send no plain update"),
    ],
)
def test_what_cannot_be_audited_is_a_line(tiny, tmp_path, override, words):
    (tmp_path / "audit").mkdir()
    out = tmp_path / ("audit" if override == "rounds=2" else "other")
    extra = ["clients.use=sgd"] if override.startswith("privacy=") else []
    with pytest.raises(UserError, match=words) as caught:
        audit(tiny(override, *extra), out=out, canaries=100)
    assert "\n" not in str(caught.value) and [p.name for p in tmp_path.iterdir()] == ["audit"]


def test_more_canaries_than_the_adapter_has_numbers(tiny, tmp_path):
    with pytest.raises(UserError, match="--canaries: 9999 directions do not fit"):
        audit(tiny("rounds=1"), out=tmp_path / "audit", canaries=9999)
    assert list(tmp_path.iterdir()) == []
