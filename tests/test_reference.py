"""What `fedlora explain` prints."""

import pytest

from fedlora import scenario
from fedlora.cli import main
from fedlora.deploy.site import Site
from fedlora.reference import lines, scenarios, sites, values
from fedlora.scenario import read


def test_a_key_is_explained(capsys):
    assert main(["explain", "data.partition.alpha"]) == 0
    assert capsys.readouterr().out == (
        "data.partition.alpha, kind: dirichlet\n"
        "  Concentration of the draw. Lower it for more skew: 0.1 is strong, 100 nearly none.\n"
        "  values:   number (above 0)\n"
        "  default:  required\n"
        "  example:  data: {partition: {kind: dirichlet, alpha: 0.3}}\n"
        "  beside:   seed, kind, min_examples\n"
    )


@pytest.mark.parametrize(
    "key, told",
    [
        ("clients.lr=2", "  default:  depends"),  # as it is written after --set
        ("privacy.epsilon", "  also as:  privacy.example.epsilon"),
        ("privacy.example.epsilon", "  also as:  privacy.epsilon"),
        ("data.public.hub.text", "  also as:  data.hub.text"),
        ("clients.tiers.phone.rank", "  example:  clients: {tiers: {phone: {rank: 4}}}"),
        ("strategy.server.lr", "strategy.server.lr, kind: momentum"),
        ("clients.optimizer.betas", "clients.optimizer.betas, kind: adamw"),
        ("strategy", "  Further keys are options of what strategy.use names."),
        ("site.accept.metrics", "  example:  accept: {metrics: false}"),
        ("site", "  state            required        Folder of the ledger, of what clients keep, and of logs"),
    ],
)
def test_a_key_is_found_wherever_it_may_stand(key, told):
    assert told in list(lines(key))


def test_without_a_key_it_lists_those_at_the_top():
    told = list(lines(None))
    assert all(any(line.startswith(f"  {key} ") for line in told) for key in scenario.Scenario.model_fields)
    assert all(len(line) <= 115 for line in told)


@pytest.mark.parametrize(
    "key, line",
    [
        ("clients.lrr", "unknown key 'lrr' in clients: did you mean 'lr'?"),
        ("lr", "unknown key 'lr': did you mean 'clients.lr' or 'strategy.server.lr'?"),
        ("clients.use.x", "unknown key 'x' in clients.use: it has no keys of its own"),
        ("site.acept", "unknown key 'acept' in site: did you mean 'accept'?"),
        ("max_epsilon", "unknown key 'max_epsilon' in site: did you mean 'site.privacy.max_epsilon'?"),
        ("names", "unknown key 'names': did you mean 'name'?"),
    ],
)
def test_an_unknown_key_is_one_line(key, line, capsys):
    assert main(["explain", key]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith(line) and told.err.count("\n") == 1


@pytest.mark.parametrize("key", ["figures", "personalise.steps"])
def test_a_key_of_site_files_alone_is_found_without_their_name(key, capsys):
    assert main(["explain", key]) == 0
    assert capsys.readouterr().out.startswith(f"site.{key} (site file)\n")
    assert main(["explain", f"site.{key}"]) == 0


def test_every_key_is_explained_with_an_example_in_yaml():
    for all_keys in (scenarios(), sites()):
        for key in all_keys.keys:
            (first, *_) = lines(key.path)
            assert first.startswith(key.path)
            held, _, problems = read(key.line, key.path)
            assert not problems
            for part in key.path.removeprefix(all_keys.prefix).lstrip(".").split("."):
                held = held[part]
            assert key.example != "null" or key.told["description"].startswith("Not used"), key.path
    assert {key.path for key in sites().keys} >= {f"site.{name}" for name in Site.model_fields}


@pytest.mark.parametrize(
    "told, words",
    [
        ({"type": "integer", "minimum": 1}, "whole number (at least 1)"),
        ({"anyOf": [{"type": "number"}, {"type": "null"}]}, "number or null"),
        ({"enum": ["a", "b"]}, "a, b"),
        ({"enum": list(range(30))}, "one of 30 names"),
        ({"type": "array", "prefixItems": [{"type": "number"}] * 2}, "list of: number"),
        ({"type": "object", "additionalProperties": {"type": "string"}}, "mapping of names to: text"),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 2**63}, "number (above 0)"),
    ],
)
def test_values_are_said_in_words(told, words):
    assert values(told) == words
