"""A base cut before the first round: what is paid, by whom, what goes on, and what is refused."""

import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora import planning, prepare, simulate, statistic_round
from fedlora.data.examples import Examples, Partition
from fedlora.engine.statistic import Taker, weighed
from fedlora.engine.worker import Worker
from fedlora.errors import SettingError, UserError
from fedlora.privacy import accounting, ledger
from fedlora.reports.console import size
from fedlora.reports.planned import plan_lines
from fedlora.seeding import stream

CUT = "compress={use: lord, keep: 0.5}"
GRAM = (CUT, "statistics={kind: gram, epsilon: 2}")


def factors(run):
    return load_file(run.folder / "base" / "factors.safetensors")


def manifest(run):
    return json.loads((run.folder / "base" / "manifest.json").read_text())


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    return simulate(tiny(*GRAM), out=tmp_path_factory.mktemp("runs") / "gram")


def test_each_client_pays_once_before_it_trains_and_the_whole_stays_within_the_budget(run):
    lines = [json.loads(line) for line in (run.folder / "privacy.jsonl").read_text().splitlines()]
    first = [line for line in lines if line["round"] == 0]
    assert [line["client"] for line in first] == [0, 1, 2, 3] and lines[:4] == first
    assert {(x["steps"], x["sample_rate"], x["clip_norm"], x["statistic"]) for x in first} == {
        (1, 1.0, 1.0, "gram")
    }
    assert 1.9 < accounting.epsilon(ledger.replay(run.folder / "privacy.jsonl")[0][:1], 1e-3) <= 2.0
    whole = ledger.epsilon_of(run.folder / "privacy.jsonl")
    assert whole == run.summary["epsilon"] and 7.9 < whole <= 8.0
    assert "epsilon 2 of it went to a statistic by which the base was cut" in run.summary["privacy"]


def test_the_sum_is_what_dp_accounting_says_of_both(run):
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    statistic, training = ledger.replay(run.folder / "privacy.jsonl")[0][0], None
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for event in ledger.replay(run.folder / "privacy.jsonl")[0]:
        one = PoissonSampledDpEvent(event.sample_rate, GaussianDpEvent(event.noise_multiplier))
        accountant.compose(SelfComposedDpEvent(one, event.steps))
        training = event
    assert training.noise_multiplier != statistic.noise_multiplier
    assert run.summary["epsilon"] == pytest.approx(accountant.get_epsilon(1e-3), rel=0.02)


def test_training_has_more_noise_than_without_a_statistic(tiny):
    noise = []
    for told in ((CUT,), GRAM):
        ready = prepare.prepare(tiny(*told))
        noise.append(max(prepare.calibrate(ready.scenario, ready.data).values()))
    assert noise[1] > 1.02 * noise[0]


def test_what_it_was_cut_by_is_in_the_manifest_the_summary_and_the_card(run):
    told = manifest(run)["statistic"]
    assert (
        told["kind"] == "gram" and told["of"] == "clients" and told["epsilon"] == 2 and told["unit"] == "example"
    )
    cut = run.summary["compress"]
    assert cut["use"] == "lord" and cut["parameters"]["after"] < cut["parameters"]["before"]
    assert 0 < cut["error"] < 1 and cut["layers"] == "13 layers"
    assert any(said.startswith("Its base was cut by lord from ") for said in run.remarks())
    card = (run.folder / "adapter" / "README.md").read_text()
    assert "cut by `lord`" in card and "a statistic of clients' rows (gram)" in card


def test_its_bytes_are_those_of_the_plan_and_count_in_the_total(run, tiny):
    told = planning.plan(tiny(*GRAM))
    assert manifest(run)["statistic"]["bytes_up"] == told.statistics["bytes_up"]
    assert run.summary["bytes_up_total"] == told.bytes_up_total
    rounds = sum(line["bytes_up"] for line in run.rounds)
    assert run.summary["bytes_up_total"] - rounds == told.statistics["bytes_up"]


def test_it_repeats_bit_by_bit_and_other_rows_have_other_noise(run, tiny, tmp_path):
    again = simulate(tiny(*GRAM), out=tmp_path / "again")
    assert all(np.array_equal(t, factors(again)[n]) for n, t in factors(run).items())
    assert again.summary["accuracy"] == run.summary["accuracy"]


def test_the_noise_in_the_statistic_is_that_of_the_ledger(tiny, tmp_path, known):
    """The sums of four clients with noise, less the same without: of the deviation that the compressor is told."""
    simulate(tiny(*GRAM), out=tmp_path / "noised")
    simulate(tiny(CUT, "statistics={kind: gram}", private=False), out=tmp_path / "plain")
    noised, plain = known
    told = next(iter(noised.values())).deviation
    examples = sum(
        x["num_examples"] for x in json.loads((tmp_path / "plain/partitions.json").read_text())["clients"]
    )
    event = ledger.replay(tmp_path / "noised" / "privacy.jsonl")[0][0]
    assert told == pytest.approx(event.noise_multiplier * 2 / examples)  # of four clients
    own = [n for n in noised if n.endswith(("query", "attention.output.dense", "intermediate.dense"))]
    same = np.stack([(noised[n].values - plain[n].values) for n in own if noised[n].values.shape == (32, 32)])
    assert same[:, np.eye(32, dtype=bool)].std() == pytest.approx(told, rel=0.15)
    assert same[:, np.triu(np.ones((32, 32), bool), 1)].std() == pytest.approx(told / 2**0.5, rel=0.05)
    assert all(s.deviation == 0 for s in plain.values()) and len(same) == 6


@pytest.fixture
def known(monkeypatch):
    """What each run's base is cut by, of every layer; nothing is cut."""
    from fedlora import statistic_round
    from fedlora.compressors import contract

    seen = []
    monkeypatch.setattr(
        statistic_round.compressing.contract,
        "compress",
        lambda c, w, known: seen.append(known) or {n: contract.Cut(x.shape) for n, x in w.items()},
    )
    return seen


def test_under_masks_the_sum_is_the_plain_one_to_the_grid(tiny, tmp_path, known):
    plain = (CUT, "statistics={kind: gram}", "rounds=1")
    for name, more in (("plain", ()), ("masked", ("secure_aggregation={range: 2.0}",))):
        simulate(tiny(*plain, *more, private=False), out=tmp_path / name)
    one, other = known
    held = [x["num_examples"] for x in json.loads((tmp_path / "plain/partitions.json").read_text())["clients"]]
    matrices = len({id(s.values) for s in one.values()})
    step = 2 ** np.ceil(np.log2(max(held))) / matrices**0.5 / 2**19
    for name, statistic in one.items():
        apart = np.abs(statistic.values - other[name].values).max() * sum(held)
        assert apart <= 4 * step and other[name].deviation == 0
    assert one.keys() == other.keys()


SHARED = (
    "clients.local_steps=1",
    "clients.optimizer=null",
    "secure_aggregation={range: 8.0, noise: shared}",
)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_under_masks_each_pays_its_own_noise_or_its_part(tiny, tmp_path, known, shared):
    """Of four clients three send at the least, of whom one may look: K = 2."""
    masks = SHARED if shared else ("secure_aggregation={range: 8.0}",)
    scenario = tiny(*GRAM, "rounds=1", *masks)
    run = simulate(scenario, out=tmp_path / "run")
    simulate(tiny(CUT, "statistics={kind: gram}", "rounds=1", private=False), out=tmp_path / "plain")
    first = [event for (event, *_) in ledger.replay(run.folder / "privacy.jsonl").values()]
    parts, sigma = 2.0 if shared else 1.0, prepare.statistic(tiny(*GRAM)).noise_multiplier
    assert {event.sharers for event in first} == {parts} and len(first) == 4
    assert first[0].noise_multiplier == pytest.approx(sigma / parts**0.5)
    assert 1.9 < accounting.epsilon(accounting.in_sums(first[:1]), 1e-3) <= 2.0 + 1e-9
    assert 7.9 < run.summary["epsilon"] <= 8.0 + 1e-9
    assert ((run.summary["own_epsilon"] or 0) > 8) is shared

    noised, plain = known
    told = next(iter(noised.values())).deviation
    held = [x["num_examples"] for x in json.loads((tmp_path / "plain/partitions.json").read_text())["clients"]]
    assert told == pytest.approx(sigma * (4 / parts) ** 0.5 / sum(held), rel=1e-6)
    own = [n for n in noised if n.endswith(("query", "attention.output.dense", "intermediate.dense"))]
    same = np.stack([(noised[n].values - plain[n].values) for n in own if noised[n].values.shape == (32, 32)])
    assert same[:, np.eye(32, dtype=bool)].std() == pytest.approx(told, rel=0.15)
    assert same[:, np.triu(np.ones((32, 32), bool), 1)].std() == pytest.approx(told / 2**0.5, rel=0.05)
    planned = planning.plan(scenario)
    assert planned.statistics["noise_multiplier"] == pytest.approx(sigma)
    assert manifest(run)["statistic"]["noise_multiplier"] == pytest.approx(sigma)
    assert manifest(run)["statistic"]["bytes_up"] == pytest.approx(planned.statistics["bytes_up"], rel=1e-3)
    assert "on its sum, which it masks, at noise" in planned.warnings[0]


def test_two_clients_with_rows_are_no_masked_sum_and_nobody_pays(tiny, tmp_path, monkeypatch):
    from fedlora.data.store import Dataset

    units = Dataset.units
    monkeypatch.setattr(Dataset, "units", lambda self, client: units(self, client) if client < 2 else 0)
    with pytest.raises(UserError, match="2 clients hold rows, and a sum of statistics takes 3"):
        simulate(tiny(*GRAM, "secure_aggregation={}"), out=tmp_path / "run")
    assert not (tmp_path / "run" / "privacy.jsonl").exists()


@pytest.mark.parametrize("kind", ["mean", "row_fisher"])
@pytest.mark.parametrize("private", [True, False], ids=["private", "plain"])
def test_other_statistics_run_too(tiny, tmp_path, kind, private):
    told = f"statistics={{kind: {kind}, share: 0.5{', epsilon: 2' if private else ''}, layers: [1]}}"
    fixed = ["privacy={noise_multiplier: 1, delta: 1.0e-3, accountant: rdp}"] if private else []
    run = simulate(tiny("compress={use: fwsvd}", told, *fixed, private=private), out=tmp_path / "run")
    layers = manifest(run)["layers"]
    assert all((layer["rank"] is None) is (".layer.1." not in name) for name, layer in layers.items())
    assert (run.folder / "privacy.jsonl").exists() is private


def test_a_task_whose_model_has_no_pooler_is_cut_without_it(tiny, tmp_path):
    run = simulate(tiny("model.pooling=mean", "rounds=1", *GRAM), out=tmp_path / "run")
    assert run.summary["rounds"] == 1 and any("pooler" in name for name in manifest(run)["layers"])


def test_persons_are_paid_for_as_persons(tiny, tmp_path):
    run = simulate(
        tiny(
            *GRAM,
            "privacy={noise_multiplier: 9, delta: 1.0e-3, person: site}",
            "clients.batch_size=1",
            "clients.total=2",
        ),
        out=tmp_path / "run",
    )
    lines = [json.loads(line) for line in (run.folder / "privacy.jsonl").read_text().splitlines()]
    assert {line["unit"] for line in lines} == {"person"} and lines[0]["person"] == "site"
    assert manifest(run)["statistic"]["unit"] == "person"


def test_the_rows_of_a_person_weigh_one_together():
    examples = Examples(np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.int64))
    rows = np.array([4, 5, 6, 7])
    part = Partition(0, examples, rows, np.array([9, 3, 9, 9]))
    assert dict(weighed(part, np.array([False, True]))) == {4: 1 / 3, 6: 1 / 3, 7: 1 / 3}  # of person 9
    assert dict(weighed(part, np.array([True, False]))) == {5: 1.0}
    alone = Partition(0, examples, rows)
    assert dict(weighed(alone, np.array([True, False, False, True]))) == {4: 1.0, 7: 1.0}


def test_a_run_goes_on_with_the_base_that_it_has_and_pays_no_more(run, tiny, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run.folder, folder)
    on = simulate(tiny(*GRAM, "rounds=2"), out=folder, resume=True)
    assert len((folder / "privacy.jsonl").read_text().splitlines()) == 12 and on.summary["rounds"] == 2
    # Stopped before the base was written: what was paid for is drawn again, the same.
    for name in ("base", "checkpoint", "checkpoint.old", "adapter"):
        shutil.rmtree(folder / name)
    for name in ("summary.json", "metrics.jsonl", "clients.jsonl", "test.json"):
        (folder / name).unlink()
    again = simulate(tiny(*GRAM), out=folder, resume=True)
    assert all(np.array_equal(t, factors(again)[n]) for n, t in factors(run).items())
    assert len([x for x in (folder / "privacy.jsonl").read_text().splitlines() if '"round": 0' in x]) == 4


def test_a_base_of_other_rows_or_cuts_is_not_taken_over(run, tiny, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run.folder, folder)
    assert "of" not in manifest(run)  # the base is to be a function of the noised sum
    (folder / "base.of").write_text("other")
    shutil.rmtree(folder / "adapter")
    with pytest.raises(UserError, match="was cut in another way"):
        simulate(tiny(*GRAM), out=folder, resume=True)


def test_a_base_cut_before_is_the_base_that_a_run_cuts(run, tiny, tmp_path):
    from fedlora.compressing import compress

    one = simulate(tiny(CUT), out=tmp_path / "inside")
    folder = compress(tiny().model.base, tmp_path / "cut", use="lord", keep=0.5).folder
    other = simulate(tiny(f"model.base={folder}"), out=tmp_path / "before")
    assert one.summary["loss"] == other.summary["loss"] and one.summary["epsilon"] == other.summary["epsilon"]
    assert "base" in {p.name for p in one.folder.iterdir()} and "statistic" not in one.summary["privacy"]


def test_a_moved_run_still_answers(run, tmp_path):
    from fedlora import predict

    folder = tmp_path / "moved"
    shutil.copytree(run.folder, folder)
    file = folder / "adapter" / "fedlora.json"
    file.write_text(file.read_text().replace(str(run.folder), "/nowhere"))
    assert predict(folder, ["the film was fine"])[0].answer in ("good", "bad")


def test_the_time_of_a_statistic_grows_with_rows_noise_and_layers(tiny, monkeypatch):
    """4 clients of 48 rows of a second each, and draws and layers by a clock that goes on a second a look."""
    ticks = itertools.count()
    monkeypatch.setattr(statistic_round, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    monkeypatch.setattr(Taker, "row_seconds", lambda self, client: 1.0)
    ready = prepare.noised(prepare.prepare(tiny(*GRAM)), prepare.known)
    clients, rows = ready.data.num_clients, sum(len(ready.data.partition(c).rows) for c in range(4))
    _, _, _, taker = statistic_round._asked(ready, ready.scenario.compress)
    told = statistic_round.planned(ready, prepare.statistic(ready.scenario, prepare.known))
    assert (clients, len(taker.own)) == (4, 12) and told["seconds"] == rows + 4 + 12


def test_a_plan_counts_the_statistic_and_says_so(tiny):
    told = planning.plan(tiny(*GRAM)).to_json()
    assert 7.9 < told["epsilon"] <= 8 and told["rounds"][0]["epsilon"] > 2
    assert told["statistics"]["kind"] == "gram" and told["statistics"]["noise_multiplier"] > 0.5
    sent = told["statistics"]["bytes_up"]
    assert told["bytes_up_total"] == sum(line["bytes_up"] for line in told["rounds"]) + sent
    printed = " ".join("\n".join(plan_lines(told)).split())
    assert f"{size(sent)} of these go up before round 1" in printed
    assert told["statistics"]["seconds"] > 0 and "before, for the statistic and the cut" in printed
    said = told["warnings"][0]
    assert "Each spends epsilon 2 of its 8 on its sum" in said and "cut by lord to 50%" in said
    assert planning.plan(tiny()).to_json()["statistics"] is None
    assert "no row is looked at" in planning.plan(tiny(CUT)).to_json()["warnings"][0]


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (["statistics={kind: gram, epsilon: 1}"], "statistics are what compress goes by"),
        (["compress={use: afm}"], "afm goes by a statistic: add"),
        (
            ["compress={use: fwsvd}", "statistics={kind: gram, epsilon: 1}"],
            "goes by row_fisher or mean, and this is gram",
        ),
        (["compress={use: welore}", "statistics={kind: gram, epsilon: 1}"], "goes by the weights alone"),
        ([CUT, "statistics={kind: gram}"], "privacy is promised: add epsilon"),
        ([CUT, "statistics={kind: gram, epsilon: 8}"], "leaves nothing of privacy.epsilon: 8"),
        (
            [CUT, "statistics={kind: gram, epsilon: 1}", "privacy=null", "clients.use=sgd"],
            "goes with a privacy section",
        ),
        (
            [CUT, "statistics={kind: gram, epsilon: 1}", "privacy.unit=client", "clients.use=sgd"],
            "has unit: client",
        ),
        (
            [*GRAM, "secure_aggregation={}", "clients.total=5000", "clients.per_round=4"],
            "secure aggregation sums 3 to 4096 clients' statistics, not 5000",
        ),
        ([CUT, "model.start=runs/x"], "start is for the base as it is"),
        ([CUT, "model.quantize=8bit"], "quantize is for the base as it is"),
        (["compress={use: lorde}"], "unknown compressor 'lorde': did you mean 'lord'"),
        (["compress={use: lord, keep: 0}"], "compress.keep"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(tiny, told, why):
    with pytest.raises(UserError) as error:
        tiny(*told)
    assert why in str(error.value)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ((CUT, "statistics={kind: gram, epsilon: 1, layers: [7]}"), r"statistics\.layers: no layer 7 is cut"),
        (("compress={use: lord, targets: [nothing]}",), r"compress\.targets: 'nothing' matches no linear layer"),
        (("compress={use: lord, rank: 3}",), r"compress\.rank: lord has no option 'rank'"),
    ],
)
def test_what_the_base_has_not_is_refused_before_anything_is_written(tiny, tmp_path, told, why):
    with pytest.raises(UserError, match=why):
        simulate(tiny(*told), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (("compress={use: modegpt}", "statistics={kind: gram, epsilon: 2}"), "modegpt leaves parts out"),
        ((CUT, "statistics={kind: gram}"), "see each site's sum without noise"),
    ],
)
def test_sites_refuse_what_they_cannot_do(tiny, reviews, told, why):
    with pytest.raises(SettingError, match=why):
        prepare.prepare_server(tiny(*told, private="epsilon" in told[1]))


def test_a_pooled_baseline_takes_the_statistic_without_noise(tiny):
    from fedlora.baselines import derive

    made = derive(tiny(*GRAM), "pooled")
    assert made.statistics.epsilon is None and made.privacy is None and made.compress.use == "lord"


@pytest.fixture(scope="module", params=["gram", "row_fisher"])
def collected(request, tiny):
    """What takes a statistic of the tiny base, with the rows of two clients."""
    from fedlora import compressing

    uses = "lord" if request.param == "gram" else "fwsvd"
    scenario = tiny(
        f"compress={{use: {uses}}}", f"statistics={{kind: {request.param}, epsilon: 2}}", "clients.total=2"
    )
    ready = prepare.prepare(scenario)
    loaded, _ = compressing.load(scenario.model.base, None, ["all-linear"], [])
    return Taker(Worker(ready.setup), loaded.layers)


def taken(taker, rows, persons=None):
    """The sums of a client that holds such rows, without noise."""
    whole = taker.worker.dataset
    part = replace(whole.partition(0), rows=np.array(rows), persons=None if persons is None else np.array(persons))
    taker.worker.dataset = SimpleNamespace(partition=lambda client: part)
    try:
        return taker.sums(0, stream(1, "coins"))
    finally:
        taker.worker.dataset = whole


def length(one, other):
    return np.sqrt(sum(((one[name] - other[name]) ** 2).sum() for name in one))


def test_an_example_moves_the_sum_of_a_real_model_by_at_most_one(collected):
    rows = list(range(40))
    whole = taken(collected, rows)
    for left_out in (0, 17, 39):
        moved = length(whole, taken(collected, [row for row in rows if row != left_out]))
        assert 0.99 < moved <= 1 + 1e-4


def test_a_person_moves_it_by_at_most_one_however_many_rows_are_hers(collected):
    rows, persons = list(range(40)), [0] * 25 + [1] * 10 + [2] * 5
    whole = taken(collected, rows, persons)
    for person in (0, 1, 2):
        left = [(row, who) for row, who in zip(rows, persons, strict=True) if who != person]
        assert length(whole, taken(collected, *zip(*left, strict=True))) <= 1 + 1e-4


def test_coins_may_take_nobody(tiny, tmp_path):
    run = simulate(tiny(CUT, "statistics={kind: gram, share: 1.0e-4}", private=False), out=tmp_path / "run")
    assert run.summary["rounds"] == 2  # cut by the weights alone: the statistic is the same everywhere


def test_more_rounds_take_the_same_base(run, tiny, tmp_path):
    shutil.copytree(run.folder, folder := tmp_path / "copy")
    shutil.rmtree(folder / "base")  # it is lost, and made again of the same sum with the same noise
    more = simulate(tiny(*GRAM, "rounds=3"), out=folder, resume=True)
    assert all(np.array_equal(t, factors(more)[n]) for n, t in factors(run).items())


def test_what_does_not_fit_the_adapter_is_refused_before_the_base_is_cut(tiny, tmp_path):
    with pytest.raises(UserError, match="no tensor of this adapter is 'C'"):
        simulate(tiny(*GRAM, "strategy.server={kind: adam, lr: {B: 1, head: 1, C: 1}}"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_search_of_learning_rates_takes_a_base_as_it_is(tiny_yaml, tmp_path):
    from fedlora.tuning import tune

    (file := tmp_path / "a.yaml").write_text(tiny_yaml)
    with pytest.raises(UserError, match="tune takes a base as it is"):
        tune(file, overrides=[CUT], private=True)
