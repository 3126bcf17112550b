"""What a scenario means where it does not say."""

import pytest

from fedlora.scenario import parse

SHORT = """
name: short
data: {dataset: tweets}
clients: {total: 5}
"""
PRIVATE = "privacy={epsilon: 8}"


def test_data_clients_and_privacy_are_a_scenario():
    made = parse(SHORT, "short.yaml", [PRIVATE])
    assert (made.clients.use, made.clients.local_steps, made.clients.lr) == ("dp_sgd", 1, 2.0)
    assert made.strategy.use == "ffa_lora" and made.strategy.server.kind == "adam" and made.rounds == 100
    assert made.privacy.delta == 1e-5
    assert parse(made.to_yaml(), "again.yaml").hash == made.hash  # all of it is in the resolved form
    assert parse(SHORT).clients.use == "sgd"


@pytest.mark.parametrize(
    "settings, rate",
    [
        ((), 0.5),
        ((PRIVATE,), 2.0),
        ((PRIVATE, "privacy.clip_norm=4"), 0.5),
        ((PRIVATE, "privacy.clip_norm=1e-3"), 2000.0),
        (("clients.optimizer=adamw",), 0.002),
        (("clients.optimizer={kind: NAdam}",), 0.002),
        ((PRIVATE, "clients.optimizer=adamw"), 0.01),
        (("privacy={unit: client, epsilon: 8}",), 0.5),
        (("privacy={unit: client, epsilon: 8, example: {epsilon: 8}}",), 2.0),
        ((PRIVATE, "clients.lr=0.25"), 0.25),
    ],
)
def test_a_rate_follows_from_optimiser_and_privacy(settings, rate):
    assert parse(SHORT, "short.yaml", settings).clients.lr == rate


def test_local_steps_of_a_strategy_that_is_named_are_as_ever():
    assert parse(SHORT, "short.yaml", ["strategy.use=ffa_lora"]).clients.local_steps == 10


def test_a_batch_is_a_share_of_a_client_s_examples():
    told = parse(SHORT, "short.yaml", [PRIVATE, "clients.sample_rate=0.05"]).clients
    assert [told.batch(n) for n in (1000, 410, 3)] == [50, 20, 1]
    assert parse(SHORT).clients.batch(3) == 32
