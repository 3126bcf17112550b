import pytest
import torch

from fedlora.adapter import Instruction
from fedlora.client import Rng, Setter, check_private, load, moved, pull_towards
from fedlora.clients.dp_sgd import DPSGD
from fedlora.errors import ContractError, SettingError, UserError
from fedlora.privacy.mechanisms.bands import coefficients


def test_streams_differ_by_seed_round_client_and_purpose():
    draws = [
        Rng(*key)(purpose).random()
        for key in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2))
        for purpose in ("batches", "noise")
    ]
    assert len(set(draws)) == 8
    assert Rng(1, 1, 1)("batches").random() == draws[0]
    assert len({Rng(1, 1, 1, draw)("noise").random() for draw in range(3)}) == 3
    assert Rng(1, 1, 1, 2)("noise").random() == Rng(1, 1, 1, 2)("noise").random()


def test_pull_towards_adds_the_proximal_gradient():
    parameter = torch.nn.Parameter(torch.tensor([3.0]))
    parameter.grad = torch.tensor([1.0])
    pull_towards([parameter], [torch.tensor([1.0])], {"proximal-mu": 0.5})
    assert parameter.grad.item() == 1.0 + 0.5 * (3.0 - 1.0)
    pull_towards([parameter], [torch.tensor([1.0])], {})
    assert parameter.grad.item() == 2.0


def test_a_step_that_moves_nothing_is_refused():
    still, gone = torch.zeros(2), torch.ones(2)
    moved([still, gone], [still, still], each=False)
    with pytest.raises(ContractError, match="as they were"):
        moved([still, gone], [still, still], each=True)
    with pytest.raises(ContractError):
        moved([still], [still.clone()], each=False)


def test_a_class_that_is_no_client_is_refused():
    with pytest.raises(SettingError, match="is no fedlora"):
        load("collections:OrderedDict", {})


class AnySize(DPSGD):
    """A private client that draws batches of any size."""

    limits = False


def test_a_limit_of_batches_is_for_private_clients_that_keep_to_it(tiny):
    asked = tiny("clients.batch_limit=1.5")
    check_private(DPSGD(), asked)
    with pytest.raises(SettingError, match="draws batches of any size: leave it out, or take dp_sgd") as raised:
        check_private(AnySize(), asked)
    assert raised.value.key == "clients.batch_limit" and not asked.unused
    (line,) = tiny("clients.batch_limit=1.5", private=False).unused
    assert line.startswith("clients.batch_limit: does nothing where no example is private")
    with pytest.raises(UserError, match=r"clients.batch_limit: .*1"):
        tiny("clients.batch_limit=0.9")


def test_bands_are_fitted_to_the_steps_that_noise_is_calibrated_for(tiny):
    """Two rounds of two steps, and three rounds in reserve."""
    scenario = tiny("privacy.bands=2", "privacy.reserve=3")
    told = Setter(scenario, {45: 1.0}, {45: 2})(Instruction(round=1, adapter={}, train=(), send=()), 45)
    assert scenario.counted_steps == 10 and told.bands == 2
    assert told.coefficients == coefficients(2, 10) != coefficients(2, 4)


def test_with_a_sampling_rate_a_private_client_weighs_its_batch(build):
    """Then each example weighs alike; the rate is public, and so is n."""
    worker = build("clients.sample_rate=0.2")
    instruction = worker.strategy.instruct(1, dict(worker.task.initial), [4])
    told = [worker.settings(instruction, n) for n in (45, 45)]
    assert [(one.batch_size, one.weight) for one in told] == [(9, 9.0), (9, 9.0)]
    update, _ = worker.fit(instruction, 0)
    assert update.weight == 9.0
    plain = build().settings(instruction, 45)
    assert (plain.batch_size, plain.weight) == (8, 1.0)


def test_clients_of_one_sampling_rate_need_one_noise_and_have_one_epsilon(tiny):
    """No rounding to whole examples: what is paid depends on the rate alone, and is worked out once."""
    from fedlora.prepare import calibrate, prepare

    skewed = "data.partition={kind: dirichlet, alpha: 0.5, min_examples: 20}"
    ready = prepare(tiny("clients.sample_rate=0.13", skewed))
    noise = calibrate(ready.scenario, ready.data)
    assert len(noise) > 1 and len(set(noise.values())) == 1
