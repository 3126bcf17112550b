"""What every mechanism promises; the package is listed, so a new file is tested automatically."""

import dataclasses
import importlib
import inspect
import pkgutil

import numpy as np
import pytest

from fedlora.errors import ContractError
from fedlora.privacy import mechanisms
from fedlora.privacy.mechanisms.bands import BandedGaussian
from fedlora.privacy.mechanisms.central import Central
from fedlora.privacy.mechanisms.contract import Mechanism
from fedlora.privacy.mechanisms.dp_sgd import ExampleGaussian
from fedlora.privacy.mechanisms.shared import Shared
from fedlora.privacy.mechanisms.statistic import StatisticGaussian
from fedlora.seeding import stream

COMMON = {"noise_multiplier": 1.5, "sample_rate": 0.2}
EXAMPLES = {"total": 200, "steps": 3, "clip_norm": 0.5}
MADE = {  # one of each, and of each that adapts
    BandedGaussian: lambda **more: BandedGaussian(
        batch_size=10, coefficients=(0.5,) * 4, **EXAMPLES, **COMMON, **more
    ),
    Central: lambda **more: Central(total=200, root=3, **COMMON, **more),
    ExampleGaussian: lambda **more: ExampleGaussian(
        batch_size=40, clip="quantile" if "quantile" in more else "flat", **EXAMPLES, **COMMON, **more
    ),
    StatisticGaussian: lambda **more: StatisticGaussian(total=200, **COMMON, **more),
    Shared: lambda **more: Shared(
        batch_size=40,
        clip="quantile" if "quantile" in more else "flat",
        sharers=4.0,
        range=8.0,
        **{**EXAMPLES, "steps": 1},
        **COMMON,
        **more,
    ),
}
FIXED = (BandedGaussian, Shared, StatisticGaussian)  # those whose bound does not adapt


def found():
    for module in pkgutil.iter_modules(mechanisms.__path__):
        for value in vars(importlib.import_module(f"{mechanisms.__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Mechanism) and not inspect.isabstract(value):
                yield value


CLASSES = sorted(set(found()), key=lambda cls: cls.__name__)


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__name__)
def make(request):
    return MADE[request.param]


def test_what_is_public_is_a_field_and_nothing_moves_it(make):
    made = make()
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            assert isinstance(part, int | float | bool | bytes | str | None)  # no array, no gradient
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, 0)


def test_what_it_costs_depends_on_what_is_public_alone(make):
    names = inspect.signature(type(make()).event).parameters
    assert set(names) <= {"self", "clip_norm", "draw", "again"}
    event = make().event(0.5)
    assert (event.noise_multiplier, event.sample_rate, event.clip_norm) == (1.5, 0.2, 0.5)


def test_it_takes_each_by_a_coin_of_its_own(make):
    made = make()
    turns = getattr(made, "bands", 1)
    taken = np.stack([made.taken(stream(0, "coins", k), k) for k in range(500)])  # (draws, total)
    assert taken.shape == (500, made.total)
    assert made.expected == pytest.approx(made.sample_rate * made.total / turns)
    taken = np.concatenate([taken[k::turns, k::turns] for k in range(turns)])  # those whose turn it is
    shares = taken.mean(0)
    assert abs(shares.mean() - 0.2) < 0.015 and shares.std() == pytest.approx((0.2 * 0.8 / 500) ** 0.5, rel=0.25)
    assert taken.sum(1).std() == pytest.approx((200 / turns * 0.2 * 0.8) ** 0.5, rel=0.15)  # no fixed number


def test_a_bound_that_adapts_costs_no_more(make):
    """`z_sum^-2 + (2 sigma_b)^-2 = z^-2`: by the definition of both."""
    if isinstance(make(), FIXED):
        with pytest.raises(ContractError, match=r"a bound that is fixed|do not go together"):
            make(quantile=0.5)
        return
    made = make(quantile=0.5)
    count = made.adapts.count_noise
    assert made.sum_noise**-2 + (2 * count) ** -2 == pytest.approx(1.5**-2)
    assert made.event(0.5) == make().event(0.5) and make().sum_noise == 1.5 and make().adapts is None
