"""What the text of a scenario may be: tags, bombs, garbage, and YAML written back."""

import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.errors import ScenarioError
from fedlora.scenario import Scenario, parse
from tests.scenario.test_sections import GOOD, changed, lines


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system"])
@pytest.mark.parametrize("where", ["name: mine", "total: 4"])
def test_tags_are_refused_and_never_run(tag, where, tmp_path):
    bad = f"{tag} ['touch {tmp_path / 'run'}']"
    text = GOOD.replace(where, f"name: {bad}" if where == "name: mine" else f"total: 4, x: {bad}")
    assert [line for line in lines(text) if f"{tag!r} is not plain text" in line]
    assert not (tmp_path / "run").exists()


LAUGHS = "".join(f"x{i}: &x{i} [{f'*x{i - 1}, ' * 9 if i else 'lol'}]\n" for i in range(12))  # 9 ** 11 lols


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS + GOOD, "f.yaml:2: not YAML: aliases (*name) are not read: write the value out"),
        (GOOD + "model: &m [*m, *m]", "f.yaml:6: not YAML: aliases"),
        (GOOD + "model: " + "[" * 100_000, "f.yaml:6: not YAML: nested more than 32 levels deep"),
        (GOOD + "model: " + "{a: " * 40 + "1" + "}" * 40, "nested more than 32 levels deep"),
        (GOOD + "model:\n" + "".join(" " * i + "a:\n" for i in range(1, 500)), "more than 32 levels deep"),
    ],
    ids=["laughs", "itself", "lists", "maps", "blocks"],
)
def test_bombs_are_refused_in_a_moment(text, message):
    began = time.perf_counter()
    assert message in lines(text)[0]
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    "extra",
    [
        "",
        "clients: {total: 2, use: dp_sgd}\nprivacy: {noise_multiplier: 1.0, delta: 1.0e-5}\n",
        "data: {hub: {path: p, test: ~}}\n",
        "data: {files: {train: a.csv, label: ~}}\ntask: causal_lm\n",
        "data: {dataset: tweets, partition: {kind: label_shares, shares: [[.9, .1], [.1, .9]]}}\n",
        "strategy: {use: 'lab:Mine', a: ~, b: [1, 2.5, {c: '1e3', d: 2024-01-01, '<': .inf}]}\n",
    ],
)
def test_the_resolved_yaml_reads_back_to_the_same_scenario(extra):
    made = parse(changed(extra))
    again = parse(made.to_yaml())
    assert again.model_dump() == made.model_dump() and again.hash == made.hash


@pytest.mark.parametrize(
    "override",
    ["seed=1", "rounds=3", "clients.lr=0.2", "strategy.use=fedavg_lora", "strategy.x=1", "model.adapter.r=4"],
)
def test_the_hash_differs_when_a_setting_does(override):
    assert parse(GOOD, "f.yaml", [override]).hash != parse(GOOD).hash
    assert parse(f"# a comment\n{GOOD}").hash == parse(GOOD, "g.yaml", ["seed=0"]).hash


def test_a_scenario_is_frozen():
    made = parse(GOOD)
    for section, name in ((made, "rounds"), (made.clients, "total"), (made.model.adapter, "r")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, name, 3)
    made.strategy.options["x"] = 1
    assert made.strategy.options == {}


KEYS = st.text() | st.sampled_from(["kind", "use", "total", "partition", "shares", "files", "train", "delta", "r"])
NUMBERS = st.booleans() | st.integers() | st.floats() | st.dates()
PLAIN = NUMBERS | st.none() | st.text() | st.sampled_from(["iid", "sgd", "label_shares"])
TREES = st.recursive(PLAIN, lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=3))


def check(text: str, overrides: list[str] | None = None) -> None:
    try:
        made = parse(text, "f.yaml", overrides or [])
    except ScenarioError as error:
        assert error.lines and all(line.startswith(("f.yaml:", "--set ")) for line in error.lines)
        assert "\n" not in "".join(error.lines)
    else:
        assert isinstance(made, Scenario) and parse(made.to_yaml()).hash == made.hash


@given(st.text() | st.text("[]{}:,-?!&*#|>'\"%@` \n\tab019.~<=", max_size=60))
def test_any_text_gives_a_scenario_or_its_errors(text):
    check(text)
    check(GOOD + text)
    check(GOOD, [text, f"data.{text}", f"strategy.x={text}"])


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.sampled_from(sorted(Scenario.model_fields)), TREES)
def test_any_structure_under_a_known_key_gives_a_scenario_or_its_errors(key, value):
    check(yaml.dump({**yaml.safe_load(GOOD), key: value}))
    check(changed(yaml.dump({"strategy": {"use": "ffa_lora", "option": value}})))
