import subprocess
import sys
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora import scenario
from fedlora.errors import ScenarioError, SettingError
from fedlora.scenario import Scenario, load, parse

GOOD = """\
name: mine
data: {dataset: tweets}
clients: {total: 4}
strategy: {use: ffa_lora}
rounds: 2
"""
DATA, CLIENTS, STRATEGY = GOOD.splitlines()[1:4]


def lines(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ScenarioError) as caught:
        parse(text, "f.yaml", overrides)
    return list(caught.value.lines)


@pytest.mark.parametrize("name", sorted(scenario.shipped()))
def test_every_shipped_scenario_loads_by_file_and_by_name(name):
    by_file = load(f"scenarios/{name}.yaml")
    assert by_file.name == name
    assert load(name).model_dump() == by_file.model_dump()
    assert scenario.shipped()[name]


def test_defaults_are_filled_in():
    made = parse(GOOD)
    assert (made.clients.cohort_size, made.clients.use, made.privacy) == (4, "sgd", None)
    assert (made.model.adapter.r, made.data.partition.kind, made.seed) == (8, "iid", 0)
    assert parse(GOOD.replace("total: 4", "total: 4, per_round: 3")).clients.cohort_size == 3


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        # misspelt keys
        ("rounds: 2", "rounds: 2\nround: 3", "f.yaml:6: unknown key 'round': did you mean 'rounds'?"),
        (
            "rounds: 2",
            "rounds: 2\nzzz: 3",
            "f.yaml:6: unknown key 'zzz': known: clients, data, engine, eval_every",
        ),
        (DATA, DATA[:-1] + ", max_len: 3}", "f.yaml:2: unknown key 'max_len' in data: did you mean 'max_length'?"),
        (
            "rounds: 2",
            "rounds: 2\nmodel:\n  adapter:\n    rr: 4",
            "f.yaml:8: unknown key 'rr' in model.adapter: did",
        ),
        (
            "total: 4",
            "total: 4, per_rond: 2",
            "f.yaml:3: unknown key 'per_rond' in clients: did you mean 'per_round'?",
        ),
        ("total: 4", "use: sgd", "f.yaml:3: clients.total is missing"),
        (
            DATA,
            "data: {dataset: tweets, partition: {kind: dirichlet, alpha: 1, apha: 2}}",
            "did you mean 'alpha'?",
        ),
        # misspelt names
        ("tweets", "tweet", "f.yaml:2: data.dataset: unknown dataset 'tweet': did you mean 'tweets'?"),
        ("ffa_lora", "ffa_lra", "f.yaml:4: strategy.use: unknown strategy 'ffa_lra': did you mean 'ffa_lora'?"),
        ("total: 4", "total: 4, use: sdg", "f.yaml:3: clients.use: unknown client 'sdg': did you mean 'sgd'?"),
        ("ffa_lora", "'lab:'", "f.yaml:4: strategy.use: 'lab:' should read 'package.module:Class'"),
        (
            DATA,
            "data: {dataset: tweets, partition: {kind: dirichle}}",
            "unknown kind 'dirichle': did you mean 'dir",
        ),
        (
            DATA,
            "data: {dataset: tweets, partition: {alpha: 1}}",
            "f.yaml:2: data.partition: needs a kind, one of iid",
        ),
        # values
        ("rounds: 2", "rounds: 0", "f.yaml:5: rounds: should be greater than or equal to 1, not 0"),
        ("rounds: 2", "rounds: yes", "f.yaml:5: rounds: should be a number, not True"),
        ("rounds: 2", "rounds: 2.5", "f.yaml:5: rounds: should be a valid integer"),
        (
            "rounds: 2",
            "rounds: 2\nseed: 9223372036854775808",
            "f.yaml:6: seed: should be less than 9223372036854775808",
        ),
        ("rounds: 2", "rounds: 0x" + "f" * 5000, "f.yaml:5: rounds: '0xffff"),
        ("name: mine", "name: a b", "f.yaml:1: name: "),
        ("total: 4", "total: 4, lr: .nan", "f.yaml:3: clients.lr: should be "),
        (
            "total: 4",
            "total: 4, per_round: 5",
            "clients.per_round: should be at most the 4 clients in total, not 5",
        ),
        (
            "rounds: 2",
            "rounds: 2\nmodel: {adapter: {kind: dora}}",
            "f.yaml:6: model.adapter.kind: should be 'lora', not 'd",
        ),
        ("rounds: 2", "rounds: 2\nmodel: ~", "f.yaml:6: model: should be a mapping of keys to values, not None"),
        (
            DATA,
            "data: {dataset: tweets, partition: {kind: dirichlet, alpha: 0}}",
            "partition.alpha: should be greater than 0",
        ),
        (
            DATA,
            "data: {dataset: tweets, partition: {kind: dirichlet}}",
            "f.yaml:2: data.partition.alpha is missing",
        ),
        (DATA, "data: {}", "f.yaml:2: data: name one of dataset, hub and files, not none of them"),
        (
            DATA,
            "data: {dataset: tweets, hub: {path: p}}",
            "name one of dataset, hub and files, not dataset and hub",
        ),
        ("rounds: 2", "rounds: 2\nprivacy: {delta: 1}", "f.yaml:6: privacy.delta: should be less than 1, not 1"),
        # what spans sections
        (
            "total: 4",
            "total: 4, use: dp_sgd",
            "f.yaml:3: dp_sgd needs a privacy section, such as 'privacy: {epsilon: 6",
        ),
        (
            "rounds: 2",
            "rounds: 2\nprivacy: {epsilon: 6, delta: 1.0e-5}",
            "f.yaml:3: sgd adds no noise, and a privacy",
        ),
        ("tweets", "gsm8k", "f.yaml:2: gsm8k is for task: causal_lm, and the task is classification"),
        # YAML itself
        ("rounds: 2", "rounds: 2\nrounds: 3", "f.yaml:6: rounds is written twice, first on line 5"),
        ("total: 4", "total: 4, total: 5", "f.yaml:3: clients.total is written twice, first on line 3"),
        ("rounds: 2", "rounds: 2\nmodel: {a: [", "f.yaml:7: not YAML: "),
        ("rounds: 2", "rounds: 2\n\tseed: 1", "f.yaml:6: not YAML: found character '\\t'"),
        ("rounds: 2", "rounds: 2\nx: \0", "f.yaml:6: not YAML: unacceptable character #x0000"),
        ("rounds: 2", "rounds: 2\n? [a]\n: 1", "f.yaml:6: keys are plain words"),
        ("rounds: 2", "rounds: 2\n<<: {seed: 1}", "f.yaml:6: keys are plain words"),
        (
            "total: 4",
            "total: 4, x: !!binary gICA",
            "f.yaml:3: clients.x: 'gICA' is not plain text, a number or a list",
        ),
        ("name: mine", "name: !!bool x", "f.yaml:1: name: 'x' is not plain text, a number or a list"),
    ],
)
def test_a_mistake_is_a_line_with_its_place_and_its_remedy(old, new, line):
    assert old in GOOD
    found = lines(GOOD.replace(old, new))
    assert len(found) == 1 and line in found[0]
    assert found[0].startswith("f.yaml:")


@pytest.mark.parametrize("text", ["", "~", "hello", "- a\n- b", "3"])
def test_a_scenario_is_a_mapping(text):
    assert lines(text) == ["f.yaml:1: a scenario is a mapping of keys to values, such as 'name: mine'"]


def test_every_mistake_is_reported_at_once():
    text = "name: a b\nseed: -1\ndata: {dataset: tweet, max_length: 1}\nclients: {total: 0, lr: x}\nroundz: 3\nrounds: 0\n"
    found = lines(text, "model.adapter.r=0", "strategy.use=ffa")
    keys = ["name", "seed", "data.dataset", "data.max_length", "clients.total", "clients.lr", "roundz", "rounds"]
    keys += ["model.adapter.r", "strategy.use"]
    assert all(sum(key in line for line in found) >= 1 for key in keys)
    assert [line.split(": ")[0] for line in found] == [
        *("f.yaml:1", "f.yaml:2", "--set model.adapter.r=0", "f.yaml:3", "f.yaml:3", "f.yaml:4", "f.yaml:4"),
        *("--set strategy.use=ffa", "f.yaml:6", "f.yaml:5"),
    ]
    assert [line.partition(": ")[2][:12] for line in lines("seed: 1")] == [
        *("'name' is mi", "'data' is mi", "'clients' is", "'strategy' i", "'rounds' is "),
    ]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["rounds=0"], "--set rounds=0: rounds: should be greater than or equal to 1, not 0"),
        (["data.dataset=tweet"], "--set data.dataset=tweet: data.dataset: unknown dataset 'tweet': did you mean"),
        (["data={dataset: tweet}"], "--set data={dataset: tweet}: data.dataset: unknown dataset"),
        (["data.max_len=3"], "--set data.max_len=3: unknown key 'max_len' in data: did you mean 'max_length'?"),
        (["model.partition.kind=iid"], "--set model.partition.kind=iid: unknown key 'partition' in model"),
        (["privacy.clip_norm=1"], "--set privacy.clip_norm=1: privacy.delta is missing"),
        (
            ["data.partition.kind=dirichlet"],
            "--set data.partition.kind=dirichlet: data.partition.alpha is missing",
        ),
        (["rounds"], "--set rounds: overrides read 'key.subkey=value', such as 'privacy.epsilon=3'"),
        (["=3"], "--set =3: overrides read"),
        (["a..b=3"], "--set a..b=3: overrides read"),
        (["rounds.x=3"], "--set rounds.x=3: rounds holds no keys"),
        (["rounds=[1"], "--set rounds=[1: '[1' is not a YAML value"),
        (["name=!!python/name:os.system x"], "name: 'x' is not plain text, a number or a list"),
        (["name=[&a [x], *a]"], "'[&a [x], *a]' is not a YAML value"),
    ],
)
def test_overrides_pass_the_same_checks_and_are_cited(overrides, line):
    assert any(found.startswith("--set") and line in found for found in lines(GOOD, *overrides))


def test_overrides_replace_and_make_keys():
    made = parse(
        GOOD, "f.yaml", ["rounds=9", "privacy={epsilon: 3, delta: 1e-5}", "clients.use=dp_sgd", "clients.lr=2"]
    )
    assert made.privacy is not None
    assert (made.rounds, made.privacy.epsilon, made.privacy.delta, made.clients.lr) == (9, 3.0, 1e-5, 2.0)


def test_naming_one_source_replaces_the_others():
    made = parse(GOOD, "f.yaml", ["data.files.train=a.csv", "data.files.test=b.csv"])
    assert made.data.dataset is None and made.data.files is not None
    assert (made.data.files.train, made.data.files.test) == ("a.csv", "b.csv")
    assert parse(GOOD, "f.yaml", ["data.hub={path: p}", "data.dataset=sst2"]).data.hub is None
    assert parse(GOOD, "f.yaml", ["data.hub=~"]).data.dataset == "tweets"


def test_naming_another_kind_of_partition_drops_the_keys_of_the_first():
    text = GOOD.replace(DATA, "data: {dataset: tweets, partition: {kind: dirichlet, alpha: 0.3}}")
    assert parse(text, "f.yaml", ["data.partition.kind=iid"]).data.partition.kind == "iid"
    kept = parse(text, "f.yaml", ["data.partition.kind=dirichlet"]).data.partition
    assert isinstance(kept, scenario.Dirichlet) and kept.alpha == 0.3


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
        (
            GOOD + "model:\n" + "".join(" " * (i + 1) + "a:\n" for i in range(500)),
            "nested more than 32 levels deep",
        ),
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
        "privacy: {noise_multiplier: 1.0, delta: 1.0e-5}\nclients: {total: 2, use: dp_sgd}\n",
        "data: {hub: {path: p, test: ~}}\n",
        "task: causal_lm\ndata: {files: {train: a.csv, label: ~}}\n",
        "data: {dataset: tweets, partition: {kind: label_shares, shares: [[.9, .1], [.1, .9]]}}\n",
        "strategy: {use: 'lab:Mine', a: ~, b: [1, 2.5, {c: '1e3', d: 2024-01-01, '<': .inf}]}\n",
    ],
)
def test_the_resolved_yaml_reads_back_to_the_same_scenario(extra):
    kept = [line for line in GOOD.splitlines() if f"{line.split(':')[0]}:" not in extra]
    made = parse("\n".join([*kept, extra]))
    again = parse(made.to_yaml())
    assert again.model_dump() == made.model_dump() and again.hash == made.hash


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "rounds=3",
        "clients.lr=0.2",
        "strategy.use=fedavg_lora",
        "strategy.x=1",
        "model.adapter.r=4",
        "name=b",
    ],
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


def test_errors_found_later_are_placed_too():
    made = parse(GOOD, "f.yaml", ["clients.lr=2"])
    for key, where in (
        ("data.files.text", "f.yaml:2"),
        ("clients.lr", "--set clients.lr=2"),
        ("engine.kind", "f.yaml:1"),
    ):
        assert str(made.located(SettingError(key, "does not fit"))) == f"{where}: {key}: does not fit"


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    for path, message in (
        (tmp_path / "latin.yaml", "cannot be read: 'utf-8' codec"),
        (tmp_path, "is a folder; name a scenario file"),
        ("nonid", "no such file; did you mean 'noniid'?"),
        ("x" * 5000, "cannot be read: "),
    ):
        with pytest.raises(ScenarioError, match="^" + str(path)[:9]) as caught:
            load(path)
        assert message in str(caught.value)


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.dates()
    | st.sampled_from(["iid", "sgd"])
)
TREES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
KEYS = st.sampled_from(
    ["kind", "use", "total", "partition", "shares", "files", "train", "delta", "adapter", "alpha"]
)


def check(text: str, overrides: list[str] | None = None) -> None:
    try:
        made = parse(text, "f.yaml", overrides or [])
    except ScenarioError as error:
        assert error.lines and all(line.startswith(("f.yaml:", "--set ")) for line in error.lines)
    else:
        assert isinstance(made, Scenario) and parse(made.to_yaml()).hash == made.hash


@given(st.text() | st.text("[]{}:,-?!&*#|>'\"%@` \n\tab019.~<=", max_size=60))
def test_any_text_gives_a_scenario_or_its_errors(text):
    check(text)
    check(GOOD + text)
    check(GOOD, [text, f"data.{text}", f"strategy.x={text}"])


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.sampled_from(sorted(Scenario.model_fields)), st.dictionaries(KEYS | st.text(), TREES, max_size=4) | TREES
)
def test_any_structure_under_a_known_key_gives_a_scenario_or_its_errors(key, value):
    check(yaml.dump({**yaml.safe_load(GOOD), key: value}))
    check(GOOD.replace(STRATEGY, yaml.dump({"strategy": {"use": "ffa_lora", "option": value}})))


def test_checking_a_scenario_imports_nothing_heavy():
    code = f"""
import sys
from fedlora import scenario
scenario.parse({GOOD!r})
scenario.load("noniid")
print(sorted({{"torch", "ray", "flwr", "transformers", "datasets", "pandas", "opacus", "peft"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
