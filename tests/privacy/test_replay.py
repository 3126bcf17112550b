"""Noise is drawn again for the same sum alone: over others a round draws afresh and pays."""

import dataclasses
import hashlib
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fedlora.data.store import Dataset
from fedlora.engine.digests import Digests
from fedlora.engine.inline import InlineEngine
from fedlora.engine.worker import Worker
from fedlora.errors import RoundError, UserError
from fedlora.prepare import prepare
from fedlora.privacy import ledger, replay, together
from fedlora.privacy.budget import Budget
from fedlora.privacy.mechanisms.bands import Past
from fedlora.privacy.replay import Drawn, code, digest
from fedlora.rounds.loop import Loop
from fedlora.simulation import simulate
from fedlora.strategies.ffa_lora import FFALoRA

VALUES = st.recursive(
    st.integers(-9, 9) | st.text(max_size=2) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


@given(VALUES, VALUES)
def test_a_digest_is_equal_for_equal_parts_alone(one, other):
    assert (digest(7, one) == digest(7, other)) is (one == other)


def test_a_digest_sees_every_bit_the_type_and_the_shape_of_an_array_and_the_seed():
    a = np.zeros((2, 3), np.float32)
    flipped = a.copy()
    flipped.view(np.uint8)[0, 0] = 1
    variants = [a, flipped, a.T, a.reshape(-1), a.astype(np.float64), {"a": a}, [a], [a, a]]
    assert len({digest(7, v) for v in variants} | {digest(8, a)}) == len(variants) + 1
    assert digest(7, {"a": 1, "b": 2}) == digest(7, {"b": 2, "a": 1})
    assert digest(7, np.asfortranarray(flipped)) == digest(7, flipped)


def test_equal_inputs_repeat_their_draw_and_others_take_the_next_while_there_is_room():
    before = Drawn(("a", "b"))
    assert [before.draw(d) for d in "abc"] == [0, 1, 2] and Drawn().draw("a") == 0
    spent = Drawn(("a",), more=False)
    assert spent.draw("a") == 0
    with pytest.raises(RoundError, match="no epsilon is left to train again"):
        spent.draw("b")


def test_a_part_of_what_hides_a_sum_repeats_for_no_inputs():
    assert [Drawn(of, once=True).draw("a") for of in ((), ("a",), ("a", "a"))] == [0, 1, 2]
    with pytest.raises(RoundError, match="paid for in a sum with others, and no epsilon is left"):
        Drawn(("a",), more=False, once=True).draw("a")


def test_ones_own_code_is_known_by_its_file(tmp_path, monkeypatch):
    (package := tmp_path / "mine_replayed").mkdir()
    files = [package / "__init__.py", package / "own.py", package / "deep.py", tmp_path / "beside_replayed.py"]
    texts = [
        "",
        "import numpy\nfrom . import deep\nclass Mine: pass\n",
        "from beside_replayed import X\n",
        "X = 1\n",
    ]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    (tmp_path / "stranger_replayed.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    import mine_replayed.own
    import stranger_replayed

    seen = {code(mine_replayed.own.Mine())}
    for file, text in zip(files, texts, strict=True):
        file.write_text(f"{text}# edited\n")
        seen.add(code(mine_replayed.own.Mine()))
        file.write_text(text)
    assert len(seen) == 5
    (tmp_path / "stranger_replayed.py").write_text("# edited, and not imported by them\n")
    assert code(mine_replayed.own.Mine()) in seen and stranger_replayed is not None
    assert code(Drawn()) == hashlib.sha256(b"fedlora.privacy.replay:Drawn").hexdigest()


# Runs that are stopped after a round was paid for, and go on otherwise.


@pytest.fixture
def rows(tmp_path):
    """A file of examples, and a scenario of it; `change` writes other texts for some of them."""
    file = tmp_path / "rows.csv"

    def write(word):
        lines = [f"text {i} {word if i % 4 == 0 else 'same'},{'good' if i % 2 else 'bad'}" for i in range(240)]
        file.write_text("text,label\n" + "\n".join(lines) + "\n")

    write("old")
    write.files = f"data.files={{train: {file}, text: text, label: label}}"
    return write


def killed(round):
    """A `Loop._record` that is killed between the payment of a round and its checkpoint."""
    original = Loop._record

    def record(self, now, *rest):
        if now == round:
            raise RuntimeError("killed")
        original(self, now, *rest)

    return record


def updates_of(monkeypatch):
    """All updates that engines make, by round and client."""
    seen = {}
    original = InlineEngine.train

    def train(self, instruction, cohort, partial_sums):
        replies = original(self, instruction, cohort, False)
        for u in replies.updates:
            seen.setdefault((instruction.round, u.clients[0]), []).append(
                np.concatenate([u.adapter[n].ravel() - instruction.adapter[n].ravel() for n in sorted(u.adapter)])
            )
        return replies

    monkeypatch.setattr(InlineEngine, "train", train)
    return seen


def lines_of(folder):
    return ledger.read(folder / "privacy.jsonl")


@pytest.mark.parametrize("round", [1, 2])
def test_a_resume_over_other_data_is_refused(tiny, rows, tmp_path, monkeypatch, round):
    """Before the first checkpoint too."""
    scenario = tiny(rows.files, "rounds=3")
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_record", killed(round))
        with pytest.raises(RuntimeError, match="killed"):
            simulate(scenario, out=tmp_path / "run")
    before = (tmp_path / "run" / "privacy.jsonl").read_bytes()
    rows("new")
    with pytest.raises(
        UserError, match="it began with other training rows and other test rows: put back what it had"
    ):
        simulate(scenario, out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "privacy.jsonl").read_bytes() == before
    rows("old")
    assert simulate(scenario, out=tmp_path / "run", resume=True).summary["rounds"] == 3


def test_rows_in_another_order_are_other_data(tiny, rows, tmp_path, monkeypatch):
    """Under bands a row's place says when its turn is."""
    scenario = tiny(rows.files, "rounds=2", "privacy.bands=2")
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_record", killed(1))
        with pytest.raises(RuntimeError, match="killed"):
            simulate(scenario, out=tmp_path / "run")
    file = tmp_path / "rows.csv"
    head, *lines = file.read_text().splitlines()
    file.write_text("\n".join([head, *lines[::-1]]) + "\n")
    with pytest.raises(UserError, match="it began with other training rows"):
        simulate(scenario, out=tmp_path / "run", resume=True)
    file.write_text("\n".join([head, *lines]) + "\n")
    origin = tmp_path / "run" / "origin.json"
    kept = origin.read_text()
    for damage in ("", "[]", '{"data": null}'):
        origin.write_text(damage)
        with pytest.raises(UserError, match=r"origin.json: is missing or damaged|it began with other data"):
            simulate(scenario, out=tmp_path / "run", resume=True)
    origin.unlink()
    with pytest.raises(UserError, match=r"origin.json: is missing or damaged: restore it, or start again"):
        simulate(scenario, out=tmp_path / "run", resume=True)
    origin.write_text(kept)
    assert simulate(scenario, out=tmp_path / "run", resume=True).summary["rounds"] == 2


def test_a_first_round_over_other_data_draws_other_noise_and_pays(tiny, rows, tmp_path, monkeypatch):
    """Were the data not compared, the digest still is."""
    monkeypatch.setattr(Dataset, "fingerprint", "one for all")
    loose = ("privacy={noise_multiplier: 3.0, delta: 1.0e-3, clip_norm: 0.01}", "rounds=1")
    scenario = tiny(rows.files, *loose)
    seen = updates_of(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_record", killed(1))
        with pytest.raises(RuntimeError, match="killed"):
            simulate(scenario, out=tmp_path / "run")
    rows("new")
    simulate(scenario, out=tmp_path / "run", resume=True)
    lines = lines_of(tmp_path / "run")
    by_client = {c: [line for line in lines if line["client"] == c] for c in range(4)}
    assert all([line["draw"] for line in of] == [0, 1] for of in by_client.values())
    assert all(len({line["digest"] for line in of}) == 2 for of in by_client.values())
    for of in seen.values():
        one, other = of
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(len(one))  # noise dwarfs the gradients here


def test_other_data_are_not_trained_on_where_the_budget_is_spent(tiny, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(Dataset, "fingerprint", "one for all")
    scenario = tiny(rows.files, "rounds=1")
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_record", killed(1))
        with pytest.raises(RuntimeError, match="killed"):
            simulate(scenario, out=tmp_path / "run")
    rows("new")
    with pytest.raises(RoundError, match="no epsilon is left to train again"):
        simulate(scenario, out=tmp_path / "run", resume=True)
    assert len(lines_of(tmp_path / "run")) == 4


def test_a_round_over_another_adapter_draws_other_noise_and_pays(tiny, tmp_path, monkeypatch):
    """A client that failed in round 2 does not, when the run goes on from the checkpoint before."""
    loose = ("privacy={noise_multiplier: 3.0, delta: 1.0e-3, clip_norm: 0.01}", "rounds=3")
    seen = updates_of(monkeypatch)
    whole = simulate(tiny(*loose), out=tmp_path / "whole")
    sound = {key: of[0] for key, of in seen.items()}
    seen.clear()
    with monkeypatch.context() as patch:
        original = InlineEngine.train

        def train(self, instruction, cohort, partial_sums):
            replies = original(self, instruction, cohort, False)
            if instruction.round != 2:
                return replies
            reports = [r if r.client else dataclasses.replace(r, error="late") for r in replies.reports]
            return dataclasses.replace(
                replies, updates=[u for u in replies.updates if u.clients != (0,)], reports=reports
            )

        patch.setattr(InlineEngine, "train", train)
        patch.setattr(Loop, "_record", killed(3))
        with pytest.raises(RuntimeError, match="killed"):
            simulate(tiny(*loose), out=tmp_path / "run")
    other = {client: seen[3, client][0] for client in range(4)}
    assert all(np.array_equal(seen[2, c][0], sound[2, c]) for c in range(4))
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    seen.clear()
    simulate(tiny(*loose), out=tmp_path / "run", resume=True)
    lines = lines_of(tmp_path / "run")
    draws = [(line["round"], line["draw"]) for line in lines if line["client"] == 1]
    assert draws == [(1, 0), (2, 0), (3, 0), (3, 1)]  # round 2 was the same again, round 3 was not
    assert [line["draw"] for line in lines_of(whole.folder) if line["client"] == 1] == [0, 0, 0]
    for client in range(4):
        one, again = other[client], seen[3, client][0]
        assert abs(np.corrcoef(one, again)[0, 1]) < 5 / np.sqrt(len(one))


@pytest.mark.parametrize("bands", [1, 2])
def test_a_ledger_that_is_ahead_of_its_checkpoint_forgets_no_draw(tiny, tmp_path, monkeypatch, bands):
    """Life 1 pays rounds 1 to 3. Its checkpoint is lost, and life 2 goes on from the one before it, with a client
    that fails in round 2, and dies in round 3 before it pays. Its checkpoint counts the lines of life 1.
    """
    loose = ("privacy={noise_multiplier: 3.0, delta: 1.0e-3, clip_norm: 0.01}", "rounds=3")
    scenario = tiny(*loose, f"privacy.bands={bands}")
    run, seen = tmp_path / "run", updates_of(monkeypatch)

    def life(record, fails=False, pays=True):
        with monkeypatch.context() as patch:
            original, spend = InlineEngine.train, Budget.spend

            def train(self, instruction, cohort, partial_sums):
                replies = original(self, instruction, cohort, partial_sums)
                if not fails or instruction.round != 2:
                    return replies
                reports = [r if r.client else dataclasses.replace(r, error="late") for r in replies.reports]
                left = [u for u in replies.updates if u.clients != (0,)]
                return dataclasses.replace(replies, updates=left, reports=reports)

            def paying(self, instruction, *rest):
                if instruction.round == 3 and not pays:
                    raise RuntimeError("killed")
                return spend(self, instruction, *rest)

            patch.setattr(InlineEngine, "train", train)
            patch.setattr(Budget, "spend", paying)
            if record:
                patch.setattr(Loop, "_record", killed(record))
            simulate(scenario, out=run, resume=run.exists())

    with pytest.raises(RuntimeError, match="killed"):
        life(3)
    checkpoint = run / "checkpoint"
    shutil.rmtree(checkpoint)  # of round 2; that of round 1 is beside it
    with pytest.raises(RuntimeError, match="killed"):
        life(0, fails=True, pays=False)
    life(0)
    lines = [line for line in lines_of(run) if line["client"] == 1]
    drawn = {(line["round"], line["draw"]): line["digest"] for line in lines}
    assert [(line["round"], line["draw"]) for line in lines] == [(1, 0), (2, 0), (3, 0), (3, 1)]
    assert len(drawn) == len(set(drawn.values())) == 4
    first, *_, last = seen[3, 1]
    assert abs(np.corrcoef(first, last)[0, 1]) < 5 / np.sqrt(len(first))  # noise dwarfs the gradients here


@pytest.mark.parametrize(
    "change",
    [
        "loss={class_weights: {good: 2}}",
        "loss={label_smoothing: 0.1}",
        "model.adapter.alpha=3",
        "data.max_length=31",
    ],
)
def test_whatever_a_scenario_says_of_training_makes_another_digest(tiny, change):
    """All but what a resumed run may change, such as its rounds."""

    def base(*overrides):
        worker = Worker(prepare(tiny(*overrides)).setup)
        return Digests(worker.task, worker.client, FFALoRA(), worker.setup, worker.scenario)._base()

    assert base(change) != base() == base("rounds=9", "eval_every=2", "engine.workers=1")


def test_weights_by_counts_that_have_changed_make_another_digest(tiny, rows, tmp_path, monkeypatch):
    """`balanced` is written out by the test rows, which may be others when a run goes on."""
    test = tmp_path / "test.csv"
    told = f"data.files={{train: {tmp_path / 'rows.csv'}, test: {test}, text: text, label: label}}"
    scenario = tiny(told, "loss={class_weights: balanced}", "rounds=1", "privacy.epsilon=100")
    monkeypatch.setattr(Dataset, "fingerprint", "one for all")
    for good in (4, 1):
        test.write_text("text,label\n" + "".join(f"a {i},{'good' if i < good else 'bad'}\n" for i in range(8)))
        with monkeypatch.context() as patch:
            patch.setattr(Loop, "_record", killed(1))
            with pytest.raises((RuntimeError, RoundError), match=r"killed|no epsilon is left"):
                simulate(scenario, out=tmp_path / "run", resume=good == 1)
    lines = [line for line in lines_of(tmp_path / "run") if line["client"] == 0]
    assert len(lines) == 1  # calibrated to one round: nothing is left for the other sum


@pytest.mark.parametrize("what", ["versions", "machine"])
def test_other_versions_or_another_device_draw_other_noise(tiny, tmp_path, monkeypatch, what):
    import torch

    loose = ("privacy={noise_multiplier: 3.0, delta: 1.0e-3, clip_norm: 0.01}", "rounds=2")
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_record", killed(2))
        with pytest.raises(RuntimeError, match="killed"):
            simulate(tiny(*loose), out=tmp_path / "run")
    with monkeypatch.context() as patch:
        if what == "versions":
            patch.setattr("fedlora.privacy.replay.versions", lambda: {"torch": "0"})
        else:
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
        simulate(tiny(*loose), out=tmp_path / "run", resume=True)
    assert [(li["round"], li["draw"]) for li in lines_of(tmp_path / "run") if li["client"] == 0] == [
        (1, 0),
        (2, 0),
        (2, 1),
    ]


def test_another_configuration_of_the_base_draws_other_noise(tiny, tiny_base, tmp_path, monkeypatch):
    """Were the base not compared, the digest still is."""
    monkeypatch.setattr("fedlora.tasks.located.fingerprint", lambda *_: None)
    base = shutil.copytree(tiny_base, tmp_path / "base")
    loose = ("privacy={noise_multiplier: 3.0, delta: 1.0e-3, clip_norm: 0.01}", "rounds=1", f"model.base={base}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_record", killed(1))
        with pytest.raises(RuntimeError, match="killed"):
            simulate(tiny(*loose), out=tmp_path / "run")
    config = base / "config.json"
    config.write_text(config.read_text().replace('"gelu"', '"relu"'))
    simulate(tiny(*loose), out=tmp_path / "run", resume=True)
    assert [li["draw"] for li in lines_of(tmp_path / "run") if li["client"] == 0] == [0, 1]


CLIENTS = ("clients.use=sgd", "clients.per_round=2", "rounds=2", "eval_every=2", "seed=5")
LOOSE = "privacy={unit: client, noise_multiplier: 4.0, delta: 1.0e-2, clip_norm: 0.5}"


def paid_twice(tiny, tmp_path, monkeypatch, *overrides):
    """The lines of a run of unit: client whose second round ran again over another sum."""
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_record", killed(2))
        with pytest.raises(RuntimeError, match="killed"):
            simulate(tiny(*CLIENTS, *overrides), out=tmp_path / "run")
    original = InlineEngine.train

    def train(self, instruction, cohort, partial_sums):
        replies = original(self, instruction, cohort, partial_sums)
        for u in replies.updates if instruction.round == 2 else ():
            next(iter(u.adapter.values()))[...] += np.float32(1e-3)
        return replies

    monkeypatch.setattr(InlineEngine, "train", train)
    simulate(tiny(*CLIENTS, *overrides), out=tmp_path / "run", resume=True)
    return lines_of(tmp_path / "run")


def test_the_servers_noise_over_another_sum_is_another_draw_and_costs_without_sampling(
    tiny, tmp_path, monkeypatch
):
    lines = paid_twice(tiny, tmp_path, monkeypatch, LOOSE)
    assert [(li["round"], li["draw"], li["sample_rate"]) for li in lines] == [
        (1, 0, 0.5),
        (2, 0, 0.5),
        (2, 1, 1.0),
    ]


def test_the_servers_noise_over_another_sum_ends_a_run_whose_budget_is_spent(tiny, tmp_path, monkeypatch):
    tight = LOOSE.replace("noise_multiplier: 4.0", "epsilon: 8")
    with pytest.raises(RoundError, match="no epsilon is left to train again"):
        paid_twice(tiny, tmp_path, monkeypatch, tight)
    assert len(lines_of(tmp_path / "run")) == 2


def test_shares_of_the_noise_over_another_sum_are_another_draw(tiny, tmp_path, monkeypatch):
    shared = ("secure_aggregation={range: 1.0, noise: shared}", "clients.total=16", "clients.per_round=16")
    lines = paid_twice(tiny, tmp_path, monkeypatch, LOOSE, *shared, "clients.batch_size=4")
    whole = [(li["round"], li["draw"]) for li in lines if li["unit"] == "client"]
    assert whole == [(1, 0), (2, 0), (2, 1)]
    seen = [(li["round"], li["draw"]) for li in lines if li["unit"] == "client_from_server" and li["client"] == 3]
    assert seen == whole


def test_the_packages_own_files_are_told_by_their_version():
    import fedlora
    from fedlora.clients import dp_sgd
    from fedlora.strategies import ffa_lora
    from fedlora.tasks import classification

    for module in (fedlora, dp_sgd, ffa_lora, classification, replay):
        assert replay._installed(module.__file__)
    assert not replay._installed(__file__)


def test_code_counts_what_is_imported_late(tmp_path, monkeypatch):
    (tmp_path / "late_task.py").write_text("class Mine:\n    def go(self):\n        from late_help import clean\n")
    (helper := tmp_path / "late_help.py").write_text("clean = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import late_task

    first = replay.code(late_task.Mine)
    helper.write_text("clean = 2\n")
    assert replay.code(late_task.Mine) != first


# Banded noise, which is drawn by the numbers of a client's steps.

BANDS = ("privacy={noise_multiplier: 3.0, delta: 1.0e-3, clip_norm: 0.01, bands: 2}", "rounds=3")


def firsts_of(monkeypatch):
    """The number of the first step of each training, by round and client, as workers draw."""
    seen = {}
    original = Past.block

    def block(self, client, first, steps):
        seen.setdefault(client, []).append(first)
        return original(self, client, first, steps)

    monkeypatch.setattr(Past, "block", block)
    return seen


def test_one_band_is_no_band(tiny, tmp_path):
    """To the last bit, and to the last word of the ledger but for the digests."""
    runs = [simulate(tiny(*more), out=tmp_path / str(i)) for i, more in enumerate([(), ("privacy.bands=1",)])]
    one, other = (tensors(run) for run in runs)
    assert all(np.array_equal(one[n], other[n]) for n in one)
    lines = [[{**li, "chain": "", "digest": ""} for li in lines_of(run.folder)] for run in runs]
    assert lines[0] == lines[1] and not any("bands" in line for line in lines[0])


def test_a_run_of_bands_that_was_interrupted_goes_on_bit_for_bit(tiny, tmp_path, monkeypatch):
    """Also where a client missed a round; steps are counted by what each client paid for."""
    some = (*BANDS, "clients.per_round=3", "rounds=4")
    seen = firsts_of(monkeypatch)
    whole = simulate(tiny(*some), out=tmp_path / "whole")
    counts = {client: list(firsts) for client, firsts in seen.items()}
    assert all(firsts == [2 * k for k in range(len(firsts))] for firsts in counts.values())
    assert sum(map(len, counts.values())) == 12 and min(map(len, counts.values())) < 4
    seen.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_record", killed(3))
        with pytest.raises(RuntimeError, match="killed"):
            simulate(tiny(*some), out=tmp_path / "run")
    run = simulate(tiny(*some), out=tmp_path / "run", resume=True)
    one, other = tensors(whole), tensors(run)
    assert all(np.array_equal(one[n], other[n]) for n in one)
    assert run.summary["epsilon"] == whole.summary["epsilon"] and len(lines_of(run.folder)) == 12
    assert {c: sorted(set(firsts)) for c, firsts in seen.items()} == counts


def test_all_words_about_a_run_of_bands_name_them(tiny, tmp_path):
    run = simulate(tiny("privacy.bands=2"), out=tmp_path / "run")
    said = "assuming cyclic Poisson sampling of examples and banded noise, b = 2"
    assert said in run.summary["privacy"] and run.summary["sampling"] == "cyclic_poisson"
    assert all(said in line for line in ledger.statements(run.folder)[1:])
    assert said in (run.folder / "adapter" / "README.md").read_text()
    assert said in together.total_epsilon([run.folder])["example"][1]
    assert 0 < ledger.epsilon_of(run.folder / "privacy.jsonl") == run.summary["epsilon"] <= 8


def test_over_other_inputs_banded_noise_has_the_next_numbers_and_is_paid_for(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_record", killed(2))
        with pytest.raises(RuntimeError, match="killed"):
            simulate(tiny(*BANDS), out=tmp_path / "run")
    seen = firsts_of(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("fedlora.privacy.replay.versions", lambda: {"torch": "0"})
        patch.setattr(Loop, "_record", killed(2))
        with pytest.raises(RuntimeError, match="killed"):
            simulate(tiny(*BANDS), out=tmp_path / "run", resume=True)
        patch.undo()
        patch.setattr("fedlora.privacy.replay.versions", lambda: {"torch": "0"})
        simulate(tiny(*BANDS), out=tmp_path / "run", resume=True)
    mine = [line for line in lines_of(tmp_path / "run") if line["client"] == 0]
    assert [(li["round"], li["draw"], li["steps"], li["bands"]) for li in mine] == [
        (1, 0, 2, 2),
        (2, 0, 2, 2),
        (2, 1, 2, 2),
        (3, 0, 2, 2),
    ]
    assert seen[0] == [4, 4, 6]  # the draw that was paid for is drawn again; round 3 is after all of them


def test_clients_that_share_passes_have_the_same_banded_noise(tiny, tmp_path):
    told = (*BANDS, "rounds=2")
    runs = [
        simulate(tiny(*told, *more), out=tmp_path / str(i)) for i, more in enumerate([(), ("engine.fused=2",)])
    ]
    one, other = (tensors(run) for run in runs)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-6)  # noise is some 1e-3


def tensors(run):
    return load_file(run.folder / "adapter" / "adapter_model.safetensors")
