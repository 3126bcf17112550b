import subprocess
import sys

import pytest

from fedlora import scenario
from fedlora.errors import ScenarioError, SettingError
from fedlora.scenario import load, parse

GOOD = """\
name: mine
data: {dataset: tweets}
clients: {total: 4}
strategy: {use: ffa_lora}
rounds: 2
"""
PRIVACY = "privacy: {epsilon: 6, delta: 1.0e-5, %s}"
DATA = "data: {dataset: tweets, partition: %s}"


def changed(text: str) -> str:
    """`GOOD` with other text in the place of a key's line, or after all lines."""
    key = text.partition(":")[0]
    rows = GOOD.splitlines()
    at = next((i for i, row in enumerate(rows) if row.startswith(f"{key}:")), len(rows))
    return "\n".join([*rows[:at], text, *rows[at + 1 :]])


def lines(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ScenarioError) as caught:
        parse(text, "f.yaml", overrides)
    return list(caught.value.lines)


@pytest.mark.parametrize("name", sorted(scenario.shipped()))
def test_every_shipped_scenario_loads_by_file_and_by_name(name):
    by_file = load(f"scenarios/{name}.yaml")
    assert by_file.name == name.rpartition("/")[2]
    assert load(name).model_dump() == by_file.model_dump()
    assert scenario.shipped()[name]


def test_defaults_are_filled_in():
    made = parse(GOOD)
    assert (made.clients.cohort_size, made.clients.use, made.privacy) == (4, "sgd", None)
    assert (made.model.adapter.r, made.data.partition.kind, made.seed) == (8, "iid", 0)
    assert parse(GOOD.replace("total: 4", "total: 4, per_round: 3")).clients.cohort_size == 3


@pytest.mark.parametrize(
    ("text", "line"),
    [
        # misspelt keys
        ("round: 3", "f.yaml:6: unknown key 'round': did you mean 'rounds'?"),
        (
            "zzz: 3",
            "f.yaml:6: unknown key 'zzz': known: baseline, clients, compress, compression, data, diagnostics, ",
        ),
        ("data: {dataset: tweets, max_len: 3}", "f.yaml:2: unknown key 'max_len' in data: did you mean 'max_len"),
        ("model:\n  adapter:\n    rr: 4", "f.yaml:8: unknown key 'rr' in model.adapter: did you mean 'r'?"),
        ("clients: {total: 4, per_rond: 2}", "f.yaml:3: unknown key 'per_rond' in clients: did you mean 'per_r"),
        ("clients: {use: sgd}", "f.yaml:3: clients.total is missing"),
        (
            "clients: {total: 4, tiers: {old: {share: 1, rnk: 2}}}",
            "unknown key 'rnk' in clients.tiers.old: did you mean 'rank'?",
        ),
        (
            "clients: {total: 4, tiers: {share: {share: 1, rnk: 2}}}",
            "'rnk' in clients.tiers.share: did you mean 'rank'?",
        ),
        (DATA % "{kind: dirichlet, alpha: 1, apha: 2}", "'apha' in data.partition: did you mean 'alpha'?"),
        # misspelt names
        ("data: {dataset: tweet}", "f.yaml:2: data.dataset: unknown dataset 'tweet': did you mean 'tweets'?"),
        ("strategy: {use: ffa_lra}", "f.yaml:4: strategy.use: unknown strategy 'ffa_lra': did you mean 'ffa_"),
        ("clients: {total: 4, use: sdg}", "f.yaml:3: clients.use: unknown client 'sdg': did you mean 'sgd'?"),
        ("strategy: {use: 'lab:'}", "f.yaml:4: strategy.use: 'lab:' should read 'package.module:Class'"),
        (DATA % "{kind: dirichle}", "f.yaml:2: data.partition: unknown kind 'dirichle': did you mean 'dirichlet"),
        (DATA % "{alpha: 1}", "f.yaml:2: data.partition: needs a kind, one of iid, dirichlet, pathological"),
        # values
        ("rounds: 0", "f.yaml:5: rounds: should be greater than or equal to 1, not 0"),
        ("rounds: yes", "f.yaml:5: rounds: should be a number, not true"),
        ("rounds: 2.5", "f.yaml:5: rounds: should be a whole number, not 2.5"),
        ("seed: 9223372036854775808", "f.yaml:6: seed: should be less than 9223372036854"),
        ("rounds: 0x" + "f" * 5000, "f.yaml:5: rounds: '0xffff"),
        ("name: a b", "f.yaml:1: name: "),
        ("clients: {total: 4, lr: .nan}", "f.yaml:3: clients.lr: should be "),
        ("clients: {total: 4, per_round: 5}", "clients.per_round: should be at most the 4 clients in total, not"),
        ("clients: {total: 1, per_round: 2}", "clients.per_round: should be at most the 1 client in total, not"),
        (
            "model: {adapter: {kind: dora}}",
            "f.yaml:6: model.adapter.kind: unknown kind of adapter 'dora': did you mean 'lora'?",
        ),
        ("model: {pooling: max}", "f.yaml:6: model.pooling: should be 'cls' or 'mean', not 'max'"),
        (
            "model: {pooling: mean, pooler: trained}",
            "f.yaml:6: with model.pooling: mean no pooler takes part: leave it frozen",
        ),
        ("compression: {up: top_k}", "compression.up: should be a mapping with a kind, such as {kind: top_k}"),
        ("compression: {up: 8}", "compression.up: should be a mapping with a kind, such as {kind: fp16}"),
        ("model: ~", "f.yaml:6: model: should be a mapping of keys to values, not null"),
        (DATA % "{kind: dirichlet, alpha: 0}", "f.yaml:2: data.partition.alpha: should be greater than 0, not 0"),
        (DATA % "{kind: dirichlet}", "f.yaml:2: data.partition.alpha is missing"),
        (DATA % "{kind: label_shares, shares: [[.5, .5], [1]]}", "every row should have one share for each label"),
        (DATA % "{kind: label_shares, shares: [[.5, .6]]}", "every row should sum to 1"),
        ("data: {}", "f.yaml:2: data: name one of dataset, hub and files, not none of them"),
        ("data: {dataset: sst2, hub: {path: p}}", "name one of dataset, hub and files, not dataset and hub"),
        (
            PRIVACY % "clip: flt",
            "f.yaml:6: privacy.clip: should be 'flat', 'per_layer', 'quantile' or 'automatic'",
        ),
        (PRIVACY % "clip: {kind: quantile, quantile: 1}", "privacy.clip.quantile: should be less than 1, not 1"),
        (PRIVACY % "bands: 0", "f.yaml:6: privacy.bands: should be auto, or a whole number from 1 to 1024, not 0"),
        (
            PRIVACY % "bands: 2, clip: quantile",
            "privacy: bands take a fixed bound, and clip: quantile moves it: write clip: flat",
        ),
        (PRIVACY % "unit: client, person: p", "privacy: person goes with unit: example, or into privacy.example"),
        (PRIVACY % "person: ''", "f.yaml:6: privacy.person: should have a character at least, not ''"),
        (PRIVACY % "rows_per_person: 2", "privacy: rows_per_person goes with person: name the column"),
        (
            PRIVACY % "person: p, rows_per_person: 0",
            "privacy.rows_per_person: should be greater than or equal to 1",
        ),
        (
            PRIVACY % "noise_multiplier: 1.0, bands: auto",
            "privacy: bands: auto is for noise that is calibrated: leave noise_multiplier out, or name a number",
        ),
        (PRIVACY % "clip: {kind: flat, quantile: 0.5}", "privacy.clip: quantile goes with kind: quantile"),
        (PRIVACY % "clip: {quantil: 0.5}", "unknown key 'quantil' in privacy.clip: did you mean 'quantile'?"),
        (
            PRIVACY % "unit: client, clip: per_layer",
            "clip: per_layer is for gradients, and unit: client clips whole",
        ),
        (
            PRIVACY % "unit: client, clip: automatic",
            "clip: automatic is for gradients, and unit: client clips who",
        ),
        (
            PRIVACY % "unit: client, quantile: 0.3",
            "f.yaml:6: privacy.quantile: moved: write privacy.clip: {kind: quantile, quantile: 0.3}",
        ),
        (
            "clients: {total: 4, use: dp_sgd, per_layer: true}\nprivacy: {epsilon: 6, delta: 1.0e-5}",
            "f.yaml:3: clients.per_layer: moved: write privacy.clip: per_layer",
        ),
        ("keep: bst", "f.yaml:6: keep: should be 'last' or 'best', not 'bst'"),
        ("keep: {best: loss, bst: 1}", "f.yaml:6: unknown key 'bst' in keep: did you mean 'best'?"),
        ("stop: {patience: 0}", "f.yaml:6: stop.patience: should be greater than or equal to 1, not 0"),
        ("data: {dataset: tweets, validation_share: 1}", "f.yaml:2: data.validation_share: should be less than 1"),
        (
            "data: {files: {train: a.csv, validation: b.csv}, validation_share: 0.5}",
            "f.yaml:2: data: validation rows are given: leave validation_share out",
        ),
        # what spans sections
        (
            "keep: best",
            "f.yaml:6: keep: what chooses must not be what reports: set data.validation_share, such as",
        ),
        ("keep: {best: loss}", "f.yaml:6: keep: what chooses must not be what reports"),
        ("stop: {patience: 3}", "f.yaml:6: stop: what chooses must not be what reports"),
        ("clients: {total: 4, use: dp_sgd}", "f.yaml:3: dp_sgd needs a privacy section, such as {epsilon: 6"),
        ("data: {dataset: gsm8k}", "f.yaml:2: gsm8k is for task: causal_lm, and the task is classification"),
        ("exact_match: {}", "f.yaml:6: a classifier writes no answers: drop it, or use task: causal_lm"),
        ("exact_match: {pattern: '('}", "f.yaml:6: exact_match.pattern: '(' is not a regular expression: missing"),
        (DATA % "{kind: label_shares, shares: [[1],[1],[1]]}", "3 rows of shares do not divide 4 clients: write"),
        # YAML itself
        ("clients: {total: 4, total: 5}", "f.yaml:3: clients.total is written twice, first on line 3"),
        ("model: {a: [", "f.yaml:6: not YAML: "),
        ("\tseed: 1", "f.yaml:6: not YAML: found character '\\t'"),
        ("x: \0", "f.yaml:6: not YAML: unacceptable character #x0000"),
        ("? [a]\n: 1", "f.yaml:6: keys are plain words"),
        ("<<: {seed: 1}", "f.yaml:6: keys are plain words"),
        ("clients: {total: 4, x: !!binary gICA}", "f.yaml:3: clients.x: 'gICA' is not plain text, a number"),
        ("name: !!bool x", "f.yaml:1: name: 'x' is not plain text, a number or a list"),
    ],
)
def test_a_mistake_is_a_line_with_its_place_and_its_remedy(text, line):
    found = lines(changed(text))
    assert len(found) == 1 and line in found[0] and found[0].startswith("f.yaml:")


@pytest.mark.parametrize("task", ["causal_lm", "preference", "token_classification", "image_classification"])
def test_a_pooling_is_for_tasks_that_judge_whole_texts(task):
    found = lines(changed(f"task: {task}\nmodel: {{pooling: cls}}"))
    assert f"f.yaml:7: it is for tasks that judge whole texts, and the task is {task}: leave it out" in found


def test_a_key_written_twice_is_told_with_both_lines():
    assert lines(GOOD + "rounds: 3") == ["f.yaml:6: rounds is written twice, first on line 5"]


@pytest.mark.parametrize("text", ["", "~", "hello", "- a\n- b", "3"])
def test_a_scenario_is_a_mapping(text):
    assert lines(text) == ["f.yaml:1: should be a mapping of keys to values, such as 'name: mine'"]


def test_every_mistake_is_reported_at_once():
    text = "name: a b\nseed: -1\ndata: {dataset: tweet, max_length: 1}\nclients: {total: 0, lr: x}\n"
    text += "roundz: 3\nrounds: 0\n"
    found = lines(text, "model.adapter.r=0", "strategy.use=ffa")
    keys = ["name", "seed", "data.dataset", "data.max_length", "clients.total", "clients.lr", "roundz", "rounds"]
    keys += ["model.adapter.r", "strategy.use"]
    assert all(sum(key in line for line in found) >= 1 for key in keys)
    assert [line.split(": ")[0] for line in found] == [
        *("f.yaml:1", "f.yaml:2", "--set model.adapter.r=0", "f.yaml:3", "f.yaml:3", "f.yaml:4", "f.yaml:4"),
        *("--set strategy.use=ffa", "f.yaml:6", "f.yaml:5"),
    ]
    assert [line.partition(": ")[2][:12] for line in lines("seed: 1")] == [
        *("'name' is mi", "'data' is mi", "'clients' is"),
    ]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["rounds=0"], "--set rounds=0: rounds: should be greater than or equal to 1, not 0"),
        (["data.dataset=tweet"], "--set data.dataset=tweet: data.dataset: unknown dataset 'tweet': did you mean"),
        (["data={dataset: tweet}"], "--set data={dataset: tweet}: data.dataset: unknown dataset"),
        (["data.max_len=3"], "--set data.max_len=3: unknown key 'max_len' in data: did you mean 'max_length'?"),
        (
            ["data.label=triag"],
            "unknown key 'label' in data: did you mean 'data.hub.label' or 'data.files.label'?",
        ),
        (["alpha=3"], "--set alpha=3: unknown key 'alpha': known: "),
        (
            ["epsilon=3"],
            "--set epsilon=3: unknown key 'epsilon': did you mean 'privacy.epsilon' or 'statistics.epsilon'?",
        ),
        (["model.partition.kind=iid"], "--set model.partition.kind=iid: unknown key 'partition' in model"),
        (["privacy.clip_norm=1"], "--set privacy.clip_norm=1: privacy: needs epsilon (a budget) or noise"),
        (
            ["privacy={epsilon: 6}", "clients.use=sgd"],
            "--set clients.use=sgd: sgd adds no noise, and privacy is promised for each example: write",
        ),
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
    text = changed(DATA % "{kind: dirichlet, alpha: 0.3}")
    assert parse(text, "f.yaml", ["data.partition.kind=iid"]).data.partition.kind == "iid"
    kept = parse(text, "f.yaml", ["data.partition.kind=dirichlet"]).data.partition
    assert isinstance(kept, scenario.Dirichlet) and kept.alpha == 0.3


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
        (tmp_path, "is a folder; name a YAML file"),
        ("nonid", "no such file; did you mean 'noniid'?"),
        ("x" * 5000, "cannot be read: "),
    ):
        with pytest.raises(ScenarioError, match="^" + str(path)[:9]) as caught:
            load(path)
        assert message in str(caught.value)


def test_checking_a_scenario_imports_nothing_heavy():
    code = f"""
import sys
from fedlora import scenario
scenario.parse({GOOD!r})
scenario.load("noniid")
heavy = {{"torch", "ray", "flwr", "transformers", "datasets", "pandas", "opacus", "peft"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_that_is_far_too_large_is_not_read(tmp_path):
    file = tmp_path / "large.yaml"
    file.write_text("name: x\n" + "#" * 2**20)
    with pytest.raises(ScenarioError, match=r"large\.yaml: holds more than 1048576 characters"):
        load(file)


def test_a_clip_is_a_word_or_a_mapping_and_is_written_out_whole():
    def clip(said):
        return parse(changed("clients: {total: 4, use: dp_sgd}\n" + PRIVACY % said)).privacy.clip.model_dump()

    assert clip("clip: automatic") == clip("clip: {kind: automatic}") == {"kind": "automatic", "quantile": None}
    assert clip("clip: quantile") == {"kind": "quantile", "quantile": 0.5}
    assert clip("clip: {kind: quantile, quantile: 0.7}") == {"kind": "quantile", "quantile": 0.7}
    assert clip("quantile: null") == clip("clip_norm: 2") == {"kind": "flat", "quantile": None}


def test_a_run_of_an_earlier_version_is_read():
    told = parse(changed("clients: {total: 4, use: dp_sgd}\n" + PRIVACY % "clip_norm: 2")).model_dump()
    del told["privacy"]["clip"]
    told["privacy"]["quantile"] = None
    assert scenario.Scenario.model_validate(told).privacy.clip.kind == "flat"


FILES = "data={files: {train: a.csv, test: t.csv, %s}%s}"
HUB = "data={hub: {path: x, train: %s, validation: %s}}"


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (FILES % ("validation: ./a.csv", ""), "data.files.validation: these are the clients' own rows"),
        (
            FILES % ("validation: ../here/t.csv", ""),
            "data.files.validation: what chooses must not be what reports",
        ),
        (
            FILES % ("text: x", ", public: {files: {train: ./a.csv}}"),
            "data.public: these are the clients' own rows",
        ),
        (
            FILES % ("text: x", ", public: {files: {train: b.csv, test: t.csv}}"),
            "data.public: what chooses must not",
        ),
        (HUB % ("train", "train"), "data.hub.validation: these are the clients' own rows"),
        (HUB % ("train", "'train[:5%]'"), "data.hub.validation: these are the clients' own rows"),
        (HUB % ("train", "test"), "data.hub.validation: what chooses must not be what reports"),
    ],
)
def test_rows_that_choose_are_neither_clients_own_nor_those_that_report(told, said, tmp_path, monkeypatch):
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    assert [said in line for line in lines(GOOD, told)] == [True]


def test_two_slices_of_a_split_are_other_rows():
    parse(GOOD, "f.yaml", [HUB % ("'train[:80%]'", "'train[80%:]'")])


@pytest.mark.parametrize("value", ["1.0e39", ".inf", ".nan", "-1", "0", "1.0e-40"])
@pytest.mark.parametrize(
    "override",
    [
        "loss={{class_weights: {{a: {}}}}}",
        "clients.lr={}",
        "clients.lr={{B: {}}}",
        "clients.max_norm={}",
        "clients.optimizer={{kind: adamw, eps: {}}}",
        "strategy.server={{kind: adam, lr: {}}}",
        "model.adapter.alpha={}",
        "privacy.clip_norm={}",
    ],
)
def test_numbers_that_single_precision_does_not_hold_are_refused(override, value):
    text = changed("clients: {total: 4, use: dp_sgd}\n" + PRIVACY % "clip_norm: 2")
    with pytest.raises(ScenarioError) as raised:
        parse(text, overrides=[override.format(value)])
    (line,) = raised.value.lines
    assert "should be" in line


@pytest.mark.parametrize("value", ["1.0", "1.0e39", ".nan", "-0.1"])
def test_all_of_a_target_cannot_be_spread(value):
    with pytest.raises(ScenarioError, match=r"loss\.label_smoothing: should be"):
        parse(GOOD, overrides=[f"loss={{label_smoothing: {value}}}"])
