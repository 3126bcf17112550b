"""Kinds of peft's own: what is taken and what is not, that a run is what peft loads, and how changes are made."""

import numpy as np
import pytest
import torch

from fedlora import evaluate, prepare
from fedlora.errors import SettingError, UserError
from fedlora.kinds import contract, modules
from fedlora.kinds.peft import LINEAR, Peft
from fedlora.planning import plan
from fedlora.simulation import simulate


def test_miss_shares_a_block_among_inputs():
    """Of four inputs two share each of the block's rows: M(theta) = (a b a b), row by row."""
    layer = Peft(2, 2.0, (), config="MissConfig").stand_in((("q", 3, 4),))["q"]
    theta = torch.tensor([[1.0, 2, 3], [4, 5, 6]])  # (r, out)
    expected = [[1, 4, 1, 4], [2, 5, 2, 5], [3, 6, 3, 6]]
    np.testing.assert_allclose(layer.change(theta), expected, atol=1e-6)
    assert layer.length() == pytest.approx(12**0.5)  # each number stands at two places, of six numbers


def test_a_layer_pulls_gradients_back():
    """<pull(G), theta> = <G, M(theta)> for every G and theta: it is the adjoint."""
    made = Peft(2, 2.0, (), config="RandLoraConfig").stand_in((("q", 6, 4),))["q"]
    layer = modules.Mapped(made.change, made.shape, 8)
    gradients, theta = torch.randn(3, 6, 4), torch.randn(made.shape)
    with torch.no_grad():
        right = (gradients * made.change(theta)).sum((1, 2))
    torch.testing.assert_close((layer.pull(gradients) * theta).flatten(1).sum(1), right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", ["VeraConfig", "WaveFTConfig"])
def test_a_private_run_is_what_peft_loads(config, tiny, reviews, tmp_path):
    """Layers of two sizes, so that frames which layers share are cut; `evaluate` finds the figures of the run."""
    told = f"model.adapter.kind={{peft: {config}{', n_frequency: 40' if config == 'WaveFTConfig' else ''}}}"
    scenario = tiny(
        told, "model.adapter.targets=[query, intermediate.dense]", "clients.lr=2.0", f"data.files.test={reviews}"
    )
    run = simulate(scenario, out=tmp_path / "run")
    assert not run.summary["failures"] and run.summary["epsilon"] is not None
    again = evaluate(run.folder / "adapter", data=reviews, metrics=["accuracy", "log_loss"])
    assert again.metrics["log_loss"] == pytest.approx(run.summary["loss"], rel=1e-4)
    assert again.metrics["accuracy"] == run.summary["accuracy"]
    assert plan(scenario).bytes_up_total == run.summary["bytes_up_total"]
    assert (
        f"peft's kind {config.removesuffix('Config').upper()}"
        in (run.folder / "adapter" / "README.md").read_text()
    )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"config": "OFTConfig"}, "'OFTConfig' is not one of those that average exactly: Miss"),
        ({"config": "FourirFTConfig"}, "unknown configuration 'FourirFTConfig': did you mean 'FourierFTConfig'"),
        ({"config": "C3AConfig", "block": 8}, "C3AConfig has no option 'block'.*block_size"),
        ({"config": "C3AConfig", "block_size": 7}, "C3AConfig: "),
        ({"config": "MissConfig", "target_modules": ["q"]}, "target_modules is said by model.adapter.targets"),
        ({"config": "FourierFTConfig", "n_frequency": 9999}, "FourierFTConfig: "),
        (
            {"config": "MissConfig", "init_weights": "bat"},
            "MissConfig as it is set is not linear in miss_block|MissConfig: ",
        ),
    ],
)
def test_what_does_not_average_or_fit_is_refused_in_a_line(options, why, tiny_base):
    from fedlora.tasks import loading

    with pytest.raises(SettingError, match=why):
        kind = contract.load("peft", 4, 4.0, ("query",), None, (), False, options)
        loading.load("classification", tiny_base, kind, labels=("a", "b"), seed=0, max_length=8, private=False)


def test_clients_do_not_share_its_passes(tiny):
    with pytest.raises(UserError, match=r"engine\.fused: clients cannot share"):
        simulate(tiny("model.adapter.kind={peft: MissConfig}", "engine.fused=2"))


def test_a_scenario_names_it_by_the_config_alone(tiny):
    kind = tiny("model.adapter.kind={peft: VeraConfig, d_initial: 0.2}").model.adapter.kind
    assert kind.use == "peft" and kind.options == {"config": "VeraConfig", "d_initial": 0.2}
    prepare.check(tiny("model.adapter.kind={peft: VeraConfig}"))
    with pytest.raises(UserError, match="BOFTConfig"):
        prepare.check(tiny("model.adapter.kind={peft: BOFTConfig}"))


NOT_LINEAR = {
    "OFTConfig": {"oft_block_size": 4, "r": 0},
    "HRAConfig": {"r": 4},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_those_that_are_left_out_do_not_average(name):
    """The mean of three against the change of the mean, by peft's own forward pass."""
    import peft

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(24, 24, bias=False)

        def forward(self, x):
            return self.q(x)

    assert name not in LINEAR
    torch.manual_seed(0)
    model = peft.get_peft_model(Tiny(), getattr(peft, name)(target_modules=["q"], **NOT_LINEAR[name]))
    trained = [p for p in model.parameters() if p.requires_grad]
    thetas = [[p.detach() + 0.5 * torch.randn_like(p) for p in trained] for _ in range(3)]

    @torch.no_grad()
    def change(theta):
        for p, value in zip(trained, theta, strict=True):
            p.copy_(value)
        return model(torch.eye(24)) - model.base_model.model.q.get_base_layer()(torch.eye(24))

    mean = sum(change(theta) for theta in thetas) / 3
    off = change([sum(each) / 3 for each in zip(*thetas, strict=True)]) - mean
    assert off.norm() > 0.1 * mean.norm()
