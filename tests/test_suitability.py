"""What is named in place of a strategy that cannot do what a scenario asks for."""

import re

import pytest

from fedlora import plugins, suitability
from fedlora import strategy as strategies
from fedlora.errors import SettingError


@pytest.mark.parametrize(
    "told",
    [
        ["strategy.use=rolora", "world={concurrency: 2}"],
        ["strategy.use=alone", "data.client_test_share=0.2", "keep=best", "data.validation_share=0.3"],
        ["strategy.use=flora", "model.quantize=4bit"],
        ["strategy.use=flexlora", "secure_aggregation={}"],
        ["strategy.use=fed_sb", "model.adapter.kind=channel", "secure_aggregation={}"],
        [
            "strategy.use=fedavg_lora",
            "clients.ranks={kind: list, values: [2, 4]}",
            "keep=best",
            "data.validation_share=0.3",
        ],
    ],
)
def test_a_strategy_that_is_named_is_refused_for_nothing_else(told, tiny):
    scenario = tiny(*told, private=False)
    made = strategies.load(scenario.strategy.use, scenario.strategy.options)
    with pytest.raises(SettingError) as caught:
        suitability.check(made, scenario)
    named = set(
        re.findall(r"[a-z_]+", re.split("take one of|take unequal ones:| goes with ", str(caught.value))[-1])
    )
    named &= set(plugins.names("strategies"))
    assert named
    for name in named:
        suitability.check(strategies.load(name, {}), scenario)


def test_where_nothing_suits_what_answers_the_one_fault_is_named(tiny):
    scenario = tiny("strategy.use=flexlora", "secure_aggregation={}", "model.adapter.kind=channel", private=False)
    made = strategies.load("flexlora", {})
    with pytest.raises(SettingError, match=r"take one of .*ffa_lora"):
        suitability.check(made, scenario)
