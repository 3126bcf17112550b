"""What `fedlora check` says that it understood, and what it refuses."""

import json

import pytest

from fedlora.checking import check, remarks
from fedlora.cli import main
from fedlora.scenario import load, parse, shipped
from fedlora.tasks.located import blocks, places

YAML = """
name: mine
model: {{base: {base}}}
data:
  files: {{train: "{train}", text: text, label: label}}
  partition: {partition}
  max_length: 16
  test_share: 0.2
clients: {{total: {total}, use: sgd}}
"""


@pytest.fixture
def made(tmp_path, tiny_base):
    """Makes a scenario over rows of texts, labels and sites."""

    def scenario(rows, partition="{kind: iid}", total=2, more=()):
        file = tmp_path / "rows.csv"
        file.write_text("text,label,site\n" + "".join(f"{t},{label},{site}\n" for t, label, site in rows))
        text = YAML.format(base=tiny_base, train=file, partition=partition, total=total)
        (tmp_path / "s.yaml").write_text(text)
        return parse(text, str(tmp_path / "s.yaml"), more)

    return scenario


ROWS = [(f"word {'more ' * (i % 20)}{i}", "ab"[i % 2], f"ward {'xyz'[i % 3]}") for i in range(60)]


def test_rows_labels_lengths_clients_and_positions_are_counted(made):
    found = check(made(ROWS))
    told = found.understood
    assert found.problems == [] and found.positions == 64 and sum(told.rows.values()) == 60
    assert sum(sum(part.values()) for part in told.labels.values()) == 60 and set(told.labels) == {"a", "b"}
    assert sum(told.sizes) == told.rows["train"] and (told.repeated, told.leaks) == (0, 0)
    assert (told.lengths.rows, told.lengths.most, told.lengths.over, told.lengths.empty) == (60, 21, 15, 0)
    lines = "\n".join(found.lines())
    assert "15 of 60 rows have more words than that" in lines and "64 of the base model" in lines
    assert "word more" not in lines


def test_natural_clients_are_counted_by_name_before_anything_is_held_out(made):
    found = check(made(ROWS, "{kind: natural, column: site}", 3))
    assert list(found.understood.names) == ["ward x", "ward y", "ward z"]
    assert "ward x" in "\n".join(found.lines())
    (problem,) = check(made(ROWS, "{kind: natural, column: site}", 4)).problems
    assert "column 'site' has 3 values: set clients.total to that" in problem


@pytest.mark.parametrize(
    ("partition", "total", "message"),
    [
        ("{kind: pathological, labels_per_client: 1}", 12, "the rarest has 2 rows: use fewer clients"),
        ("{kind: pathological, labels_per_client: 3}", 2, "labels_per_client is 3, and there are 2 labels"),
        ("{kind: iid}", 100, "100 clients, and only 75 examples"),
    ],
)
def test_a_split_that_cannot_be_is_told_by_check(made, partition, total, message):
    rows = [*((f"note {i}", "a", "x") for i in range(100)), *((f"rare {i}", "b", "x") for i in range(4))]
    problems = check(made(rows, partition, total)).problems
    assert len(problems) == 1 and message in problems[0]
    assert "num_partitions" not in problems[0]


def test_rows_without_words_and_leaks_are_told(made, tmp_path):
    rows = [("", "a", "x"), ("  ", "b", "x"), *ROWS[:20], *ROWS[:5]]
    told = check(made(rows, more=[f"data.files.test={tmp_path / 'rows.csv'}"])).understood
    assert told.lengths.empty == 4 and told.repeated == 6 and told.leaks == 27
    assert any("27 of 27 test rows have a text that stands in the training set too" in note for note in told.notes)


def test_the_command_prints_a_table_or_json_and_its_exit_code(made, tmp_path, capsys):
    made(ROWS)
    assert main(["check", str(tmp_path / "s.yaml")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 's.yaml'}: fine\n  what ")
    assert main(["check", str(tmp_path / "s.yaml"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fine"] and told["understood"]["rows"]["train"] + told["understood"]["rows"]["test"] == 60
    assert main(["check", str(tmp_path / "s.yaml"), "--json", "--set", "clients.total=500"]) == 2
    assert not (told := json.loads(capsys.readouterr().out))["fine"] and "clients.total" in told["problems"][0]
    assert main(["check", str(tmp_path / "s.yaml"), "--set", "clients.total=500"]) == 2


@pytest.mark.parametrize(
    ("config", "by_table", "count"),
    [
        ({"model_type": "bert", "max_position_embeddings": 64}, True, 64),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, True, 512),
        ({"model_type": "gpt2", "n_positions": 128}, True, 128),
        ({"model_type": "llama", "max_position_embeddings": 64}, True, None),
        ({"model_type": "llama", "max_position_embeddings": 64}, False, 64),
        ({"model_type": "t5"}, False, None),
        ([], False, None),
    ],
)
def test_positions_are_read_of_a_configuration(config, by_table, count, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert places(str(tmp_path), by_table) == count


def test_more_tokens_than_positions_are_refused(made):
    (problem,) = check(made(ROWS, more=["data.max_length=65"])).problems
    assert "data.max_length: 65 tokens, and the model has 64 positions: lower it" in problem


@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_budget_that_one_round_breaks_is_told(made, unit, tmp_path):
    from fedlora.planning import plan
    from fedlora.simulation import simulate

    asked = f"privacy={{epsilon: 1, noise_multiplier: 0.1, delta: 1.0e-5, unit: {unit}}}"
    scenario = made(
        ROWS, more=[asked, f"clients.use={'dp_sgd' if unit == 'example' else 'sgd'}", "clients.batch_size=4"]
    )
    (problem,) = check(scenario).problems
    assert "privacy.epsilon: one round under noise_multiplier 0.1 costs epsilon" in problem
    if unit == "example":
        for way in (plan, lambda s: simulate(s, out=tmp_path / "run")):
            with pytest.raises(Exception, match="nobody could train"):
                way(scenario)
        assert not (tmp_path / "run").exists()


def test_a_run_without_a_round_is_no_success(monkeypatch, made, tmp_path, capsys):
    from fedlora import simulation
    from fedlora.reports import console

    monkeypatch.setattr(simulation, "simulate", lambda *_, **__: type("Run", (), {"summary": {"rounds": 0}}))
    monkeypatch.setattr(console, "summary_lines", lambda run: [])
    made(ROWS)
    assert main(["simulate", str(tmp_path / "s.yaml")]) == 1


def test_a_base_is_told_by_where_it_is_and_what_it_is(made, monkeypatch):
    assert "on this machine, BertModel, 2 blocks" in check(made(ROWS)).base
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    away = check(made(ROWS, more=["model.base=minilmm"]))
    assert away.problems == [] and away.base == (
        "minilmm: not on this machine; it is fetched from the Hub when the run starts; did you mean 'minilm'?"
    )
    assert any(line.endswith(away.base) for line in away.lines())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (problem,) = check(made(ROWS, more=["model.base=google/none"])).problems
    assert "model.base: 'google/none' is not on this machine, and HF_HUB_OFFLINE keeps it" in problem


@pytest.mark.parametrize(
    ("base", "files", "message"),
    [
        ("{here}/none", (), "no such folder"),
        ("{here}", (), "the folder has no config.json"),
        ("{here}", ("config.json",), "the folder has no weights, such as model.safetensors"),
        ("a/b/c", (), "'a/b/c' is no folder here, and no id of the Hub"),
        ("mini lm", (), "'mini lm' is no folder here, and no id of the Hub"),
    ],
)
def test_a_base_that_cannot_be_is_refused(made, tmp_path, base, files, message):
    (here := tmp_path / "model").mkdir()
    for name in files:
        (here / name).write_text("{}")
    (problem,) = check(made(ROWS, more=[f"model.base={base.format(here=here)}"])).problems
    assert "model.base: " in problem and message in problem


@pytest.mark.parametrize("layers", ["[2]", "[0, 99]"])
def test_blocks_that_are_not_there_are_refused(made, layers):
    (problem,) = check(made(ROWS, more=[f"model.adapter.layers={layers}"])).problems
    assert "model.adapter.layers: no layer " in problem and "has 2, which are counted from 0 to 1" in problem
    assert check(made(ROWS, more=["model.adapter.layers=[0, 1]"])).problems == []


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"num_hidden_layers": 6}, 6),
        ({"n_layer": 12}, 12),
        ({"num_layers": 2, "num_decoder_layers": 4}, 4),
        ({"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 5}}, 5),
        ({"model_type": "odd", "num_hidden_layers": "many"}, None),
    ],
)
def test_blocks_are_read_of_a_configuration(config, count, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert blocks(str(tmp_path)) == count


@pytest.mark.parametrize(
    ("more", "count"),
    [
        (["clients.sample_rate=0.1"], 0),
        (["clients.batch_size=64"], 0),
        (["clients.sample_rate=0.1", "clients.batch_size=32"], 1),
        (["clients.sample_rate=0.1", "clients.batch_size=64"], 1),
    ],
)
def test_a_batch_size_that_a_rate_replaces_is_told(made, more, count):
    found = [note for note in check(made(ROWS, more=more)).notes if "clients.batch_size" in note]
    assert len(found) == count and all("is not used beside clients.sample_rate: 0.1" in note for note in found)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_no_scenario_that_ships_says_what_it_does_not_use(name):
    assert load(name).unused == []


@pytest.mark.parametrize(
    "privacy, server, told",
    [
        ("{epsilon: 8, delta: 1.0e-3, bands: 2}", "{kind: adam}", True),
        ("{epsilon: 8, delta: 1.0e-3, unit: client, bands: 2}", "{kind: adam}", True),
        ("{epsilon: 8, delta: 1.0e-3, unit: client, bands: 2}", "null", False),
        ("{epsilon: 8, delta: 1.0e-3, unit: client, bands: 1}", "{kind: adam}", False),
    ],
)
def test_bands_beside_a_server_that_rescales_are_remarked_for_clients_too(tiny, privacy, server, told):
    use = "sgd" if "client" in privacy else "dp_sgd"
    made = tiny(f"privacy={privacy}", f"strategy.server={server}", f"clients.use={use}")
    assert any("privacy.bands" in one and "strategy.server: adam" in one for one in remarks(made)) is told
